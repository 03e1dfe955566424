"""Converted CT-CLIP and DCFormer (CT-RATE) checkpoints go through zero-shot, probe and retrieval; CT-CLIP's figures are those of its release."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BatchFeature

from med3dvlm import Med3DCLIPProcessor, VolumeProcessor
from med3dvlm.checkpoints import convert_published, load_encoder
from med3dvlm.datasets import ct_rate
from med3dvlm.datasets.preparation import prepare
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.records import Records
from med3dvlm.reports.findings import FINDINGS_CT_RATE
from tests import released
from tests.golden_weights import golden, published_weights, volume

CT_VOLUME, SMALL = (40, 80, 80), (32, 64, 64)
pytestmark = pytest.mark.usefixtures("without_pictures")
Run = Callable[..., None]


def prepared(chests: SimpleNamespace, model: Path, folder: Path) -> PreparedData:
    """The volumes of every second patient, prepared for the model."""
    root = chests.root / "CT-RATE"
    studies = [
        study for split in ct_rate.splits(root) for study in ct_rate.read(root, split)[0] if int(study.patient.split("_")[1]) % 2 == 0
    ]
    prepare(root, Records(studies), VolumeProcessor.from_pretrained(model), folder)
    return PreparedData(folder)


@pytest.fixture(scope="module")
def ct_clip(chests: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("ct_clip")
    file = released.write_pickle(root / "CT-CLIP_v2.pt", published_weights("ct_clip_small"))
    texts = released.text_encoder(root / "text", "ct_clip_text_config.json")
    convert_published(file, root / "model", text_encoder=texts, size=CT_VOLUME)
    return SimpleNamespace(model=root / "model", data=prepared(chests, root / "model", root / "prepared"))


def arguments(one: SimpleNamespace) -> list[object]:
    return ["--model", one.model, "--data", one.data.root, "--split", "valid_fixed"]


def test_zero_shot_gives_the_released_latents_softmax(
    ct_clip: SimpleNamespace, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the released volume for every study and the released token ids for the prompts, the result is the softmax of the released latents."""
    ids, mask = (torch.from_numpy(golden()[f"ct_clip_small/{name}"]) for name in ("input_ids", "attention_mask"))

    def tokenize(self: Med3DCLIPProcessor, text: Sequence[str]) -> BatchFeature:
        side = 1 if all(one.endswith("is not present.") for one in text) else 0
        assert len(text) == 18 and all(one.endswith("is present.") for one in text) == (side == 0)
        return BatchFeature({"input_ids": ids[[side] * 18], "attention_mask": mask[[side] * 18]})

    monkeypatch.setattr(Med3DCLIPProcessor, "__call__", tokenize)
    monkeypatch.setattr("med3dvlm.evaluation.models.load_volumes", lambda *_: 2 * volume("volume-ctvit") - 1)
    run("zero_shot", *arguments(ct_clip), "--output", tmp_path, "--limit", 2, "--threshold-split", "none")
    image, texts = (golden()[f"ct_clip_small/{name}"].astype(np.float64) for name in ("image", "text"))
    temperature = np.exp(float(published_weights("ct_clip_small")["temperature"]))
    similar = temperature * (image[0] @ texts.T)
    expected = float(similar[0] - similar[1])
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        found = json.loads(line)["log_odds"]
        assert list(found) == list(FINDINGS_CT_RATE)
        assert len(set(found.values())) == 1 and found["emphysema"] == pytest.approx(expected, rel=1e-4)
    row = (tmp_path / "probabilities.csv").read_text().splitlines()[1].split(",")
    assert float(row[1]) == pytest.approx(np.exp(similar[0]) / np.exp(similar).sum(), abs=1e-5)


def test_ct_clip_goes_through_all_three(ct_clip: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    run("zero_shot", *arguments(ct_clip), "--output", tmp_path / "zero_shot")
    scores = json.loads((tmp_path / "zero_shot" / "scores.json").read_text())
    assert scores["encoder"]["name"] == "ctvit" and scores["encoder"]["size"] == list(CT_VOLUME)
    assert 0 < scores["macro"]["auroc"] < 1 and scores["published"]["ct_clip"]["findings"] > 5
    run("retrieval", *arguments(ct_clip), "--output", tmp_path / "retrieval", "--ks", "5,10,50,100")
    pool = json.loads((tmp_path / "retrieval" / "scores.json").read_text())["pool_16"]
    assert [name for name in pool["image_to_text"] if name[0] == "r"] == ["r5", "r10", "r50", "r100"] == list(pool["chance"])[:4]
    whole = sum(len(study.labels) == 18 for study in ct_clip.data.studies("valid_fixed"))
    assert pool["image_to_text"]["r50"] == 1 and pool["image_to_image"]["studies"] == whole
    run("linear_probe", *arguments(ct_clip), "--output", tmp_path / "probe", "--controls", 0, "--decays", 0.1)
    assert load_file(tmp_path / "probe" / "probe.safetensors")["weight"].shape[1] == 64
    assert json.loads((tmp_path / "probe" / "scores.json").read_text())["encoder"]["name"] == "ctvit"


def test_dcformer_of_ct_rate_has_no_text_encoder(chests: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    """Its release holds only an encoder, which is probed as in the paper's Table 2; scripts that need texts refuse it."""
    file = released.write_pickle(tmp_path / "checkpoint.pt", {"model": published_weights("dcformer_naive_ct_rate")})
    convert_published(file, tmp_path / "model", size=SMALL)
    one = SimpleNamespace(model=tmp_path / "model", data=prepared(chests, tmp_path / "model", tmp_path / "prepared"))
    run("linear_probe", *arguments(one), "--output", tmp_path / "probe", "--controls", 0, "--decays", 0.1)
    line = json.loads((tmp_path / "probe" / "predictions.jsonl").read_text().splitlines()[0])
    stored = load_file(tmp_path / "probe" / "probe.safetensors")
    with torch.no_grad():
        tokens = load_encoder(one.model)(load_volumes(one.data, one.data.studies("valid_fixed")[:1]))[-1][0]
    odds = stored["weight"] @ tokens.double().mean(dim=0) + stored["bias"]
    assert list(line["log_odds"].values()) == pytest.approx(odds.tolist(), abs=1e-4)
    scores = json.loads((tmp_path / "probe" / "scores.json").read_text())
    assert scores["encoder"]["name"] == "dcformer_naive" and scores["encoder"]["parameters"] == pytest.approx(5.852e6, rel=1e-3)
    for script in ("zero_shot", "retrieval"):
        with pytest.raises(ValueError, match="holds a med3d_encoder model, which does not embed"):
            run(script, *arguments(one), "--output", tmp_path / script)
