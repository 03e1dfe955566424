"""`python -m benchmarks.attention`: both implementations have equal gradients."""

import pytest

from benchmarks.attention import measure


def test_both_implementations_have_equal_gradients() -> None:
    found = [measure(way, 300, 40, 20, 128) for way in ("mask", "pieces")]
    assert found[0]["norm"] == pytest.approx(found[1]["norm"], rel=1e-4) and found[0]["norm"] > 0
