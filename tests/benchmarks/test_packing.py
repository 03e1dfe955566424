"""The benchmark of packing: both kinds of rows hold the same conversations."""

import re

import pytest

from benchmarks import packing


def test_tokens_are_counted_and_losses_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    packing.main("--image-tokens 6 --questions 2 --report 9 --layers 1 --width 32 --repeats 1".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    texts = (12 + 9) + 2 * (20 + 5) + (45 + 7)
    assert lines[1][:3] == ["study", str(2 * 6), str(2 * (1 + 6 + texts))]
    assert lines[2][:3] == ["conversation", str(2 * 4 * 6), str(2 * (4 * (1 + 6) + texts))]
    assert float(lines[1][4]) == pytest.approx(float(lines[2][4]), abs=2e-4)
    assert re.fullmatch(r"one conversation a row takes \d+\.\d+ times as long; medians of 1, \d+ threads", " ".join(lines[3]))
