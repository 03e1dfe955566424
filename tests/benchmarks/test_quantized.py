"""`python -m benchmarks.quantized` at a small size: its figures measure what their names say."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_a_model_and_a_language_model_are_measured(shell: Callable[..., str], tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    for model in (tiny_models.vlm, tiny_models.language_model):
        small = ("--methods", "int8", "--studies", 2, "--report-tokens", 4, "--output", tmp_path)
        said = shell("python", "-m", "benchmarks.quantized", model, *small)
        assert (tmp_path / "quantized.md").read_text(encoding="utf-8-sig") in said
        rows = json.loads((tmp_path / "quantized.json").read_text(encoding="utf-8-sig"))["methods"]
        stored, other = rows["stored"], rows["int8"]
        assert stored["agreement"] == 1 and abs(stored["divergence"]) < 1e-6 and stored["places"] > 20
        assert other["agreement"] > 0.9 and 0 < other["divergence"] < 0.01 and other["mib"] < stored["mib"]
        assert (stored["findings_f1"] is None) == (model is tiny_models.language_model)
