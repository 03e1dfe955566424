"""A Med3DCLIP saved in bfloat16: all evaluations that embed with it agree with the same weights in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from med3dvlm.checkpoints import load_clip
from med3dvlm.evaluation.probe import FrozenEncoder
from med3dvlm.files import read_lines
from med3dvlm.inference.saliency import PhraseSaliency
from med3dvlm.prompts import finding_prompts
from med3dvlm.reports.findings import FINDINGS_CT_RATE
from med3dvlm.search import CaseIndex

pytestmark = pytest.mark.usefixtures("without_pictures")
Run = Callable[..., None]
SPLIT, STUDIES = "valid_fixed", 8


@pytest.fixture(scope="module")
def half(chests: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the chests with weights rounded to, and stored in, bfloat16."""
    folder = tmp_path_factory.mktemp("half") / "clip"
    model, processor = load_clip(chests.clip)
    for part in (model.bfloat16(), processor):
        part.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


@pytest.fixture(scope="module")
def exact(chests: SimpleNamespace, half: Path) -> SimpleNamespace:
    """In float64: `model`, `embed(texts)`, and for the first studies of the split `volumes`, `images` (N, P) and `texts` (N, P)."""
    model, processor = load_clip(half, dtype=torch.float64)
    studies = chests.data.studies(SPLIT)[:STUDIES]

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        limits = {"truncation": True, "max_length": 64, "return_tensors": "pt", "return_token_type_ids": False}
        return torch.cat([model.encode_text(**processor.tokenizer(text, **limits)) for text in texts])

    volumes = torch.stack([chests.data.processor.dequantize(chests.data.volume(study)) for study in studies]).double()
    with torch.no_grad():
        images = model.encode_image(volumes)
    texts = embed([study.report for study in studies])
    return SimpleNamespace(model=model, processor=processor, embed=embed, volumes=volumes, images=images, texts=texts)


def least_cosine(mine: Tensor, plain: Tensor) -> float:
    assert mine.dtype == torch.float32
    return float(torch.nn.functional.cosine_similarity(mine.double(), plain).min())


def test_retrieval(chests: SimpleNamespace, half: Path, exact: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    run("retrieval", "--model", half, "--data", chests.root / "prepared", "--split", SPLIT, "--limit", STUDIES, "--output", tmp_path)
    stored = load_file(tmp_path / "embeddings.safetensors")
    assert least_cosine(stored["image"], exact.images) > 0.999 and least_cosine(stored["text"], exact.texts) > 0.999


def test_zero_shot(chests: SimpleNamespace, half: Path, exact: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    """Log-odds differ by up to 0.03, measured; they are the temperature, 14, times differences of embeddings."""
    run("zero_shot", "--model", half, "--data", chests.root / "prepared", "--split", SPLIT, "--output", tmp_path)
    rows = read_lines(tmp_path / "predictions.jsonl")[:STUDIES]
    said = torch.tensor([[row["log_odds"][name] for name in FINDINGS_CT_RATE] for row in rows], dtype=torch.float64)
    present, absent = (exact.embed([finding_prompts(name)[0][side] for name in FINDINGS_CT_RATE]) for side in (0, 1))
    expected = torch.exp(exact.model.logit_scale.detach()) * exact.images @ (present - absent).T
    torch.testing.assert_close(said, expected, rtol=0, atol=0.1)


def test_linear_probe(chests: SimpleNamespace, half: Path, exact: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    run("linear_probe", "--model", half, "--data", chests.root / "prepared", "--split", SPLIT, "--controls", 0, "--output", tmp_path)
    with torch.no_grad():
        plain = exact.model.vision_encoder(exact.volumes)[-1].mean(dim=1)
    encoder = FrozenEncoder(str(half), chests.data, "cpu")
    assert least_cosine(encoder.features(chests.data.studies(SPLIT)[:STUDIES], tmp_path / "features", "valid"), plain) > 0.999


def test_search(chests: SimpleNamespace, half: Path, exact: SimpleNamespace, tmp_path: Path) -> None:
    studies = chests.data.studies(SPLIT)
    index = CaseIndex.build(half, chests.data, tmp_path / "index", SPLIT)
    assert least_cosine(torch.from_numpy(np.array(index.scans[:STUDIES])), exact.images) > 0.999
    assert least_cosine(index.embedder.texts([studies[0].report]), exact.texts[:1]) > 0.999
    assert index.search_scan(exact.volumes[0].float(), top=1)[0].id == studies[0].id
    assert len(index.search_text(["Pleural effusion."], top=3)[0]) == 3


def test_phrases_in_scans(half: Path, exact: SimpleNamespace) -> None:
    finders = PhraseSaliency.from_pretrained(half, "cpu"), PhraseSaliency(exact.model, exact.processor)
    mine, plain = (finder.saliency(exact.volumes[0].float(), "Pleural effusion.").values for finder in finders)
    assert np.corrcoef(np.ravel(mine), np.ravel(plain))[0, 1] > 0.99
