"""Masks with the answers of a pointing model, on request."""

import base64
import gzip
import json
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pytest

from tests.inference.test_pointing import QUESTION, SHOWN, chat, scan  # noqa: F401

from .conftest import about, serving


@pytest.mark.slow  # the model learns its answer first
def test_answers_have_the_masks_of_ask(chat, scan: Path, tmp_path: Path) -> None:  # noqa: F811
    wanted = chat.ask(scan, QUESTION).masks
    with serving(tmp_path, chat=chat) as served, httpx.Client(base_url=served.address, trust_env=False, timeout=60) as http:
        with scan.open("rb") as file:
            id = http.post("/v1/scans", files={"file": ("a.nii.gz", file)}).json()["id"]
        body = {"messages": about(id, QUESTION), "places": True}
        answer = http.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == SHOWN
        lines = http.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
        last = json.loads(lines[-3].removeprefix("data: "))
        assert last["med3dvlm"]["places"] == answer["med3dvlm"]["places"]
        assert "places" not in http.post("/v1/chat/completions", json=body | {"places": False}).json()["med3dvlm"]
        report = http.post("/v1/reports", json={"scan": {"id": id}, "places": True}).json()
        assert len(report["places"]) == len(chat.report(scan).places)
    for place, one in zip(answer["med3dvlm"]["places"], wanted, strict=True):
        assert (place["sentence"], place["found"], place["side"]) == (one.name, True, one.side)
        assert abs(place["volume_ml"] - one.volume_ml) < 1e-3 * one.volume_ml
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(place["mask"].partition(",")[2])))
        np.testing.assert_allclose(image.affine, nibabel.load(scan).affine, atol=1e-4)
        assert np.asarray(image.dataobj).sum() == one.mask.sum()
