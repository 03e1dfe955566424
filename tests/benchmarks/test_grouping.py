"""`python -m benchmarks.grouping` at a small size: less of a batch is padding where rows are of like length."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.slow
def test_grouped_batches_hold_less_padding(shell: Callable[..., str], tiny_models: SimpleNamespace, prepared: Path) -> None:
    said = shell("python", "-m", "benchmarks.grouping", tiny_models.vlm, "--data", prepared, "--batch", 2, "--batches", 8)
    (random, grouped) = (float(re.search(rf"{order} +\d+ +(\S+)", said).group(1)) for order in ("random", "grouped"))  # type: ignore[union-attr]
    assert 0 <= grouped < random < 1 and "times as long" in said
