"""Parameters and operations counted from the code against the papers' figures and hand counts, and the table of `med3dvlm encoders`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from med3dvlm import cli
from med3dvlm.encoders import Size, cost, list_encoders
from med3dvlm.encoders.base import Encoder
from med3dvlm.encoders.cost import PAPER, Cost, Measurement, count, measure
from med3dvlm.encoders.vit3d import ViT3D
from tests.encoders.small import killed

Run = Callable[..., tuple[int, str, str]]
# more than 10 % from the paper's parameters
EXCEPTIONS = {
    "dcformer_nano": "the printed count is that of the encoder and CLIP's projection to 512",
    "ctvit": "the released encoder holds 23.4 M; what else the printed count holds is unknown",
}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", list(PAPER))
def test_parameters_are_within_a_tenth_of_the_papers(name: str) -> None:
    difference = abs(count(name).parameters / 1e6 / PAPER[name][0] - 1)
    assert (difference < 0.1) == (name not in EXCEPTIONS), difference


@pytest.mark.parametrize(("name", "width", "rounding"), [("dcformer_nano", 256, 0.005), ("dcformer_tiny", 768, 0.051)])
def test_some_printed_counts_include_a_projection(name: str, width: int, rounding: float) -> None:
    assert (count(name).parameters + width * 512) / 1e6 == pytest.approx(PAPER[name][0], abs=rounding)


@pytest.mark.parametrize("name", [name for name in PAPER if name != "ctvit"])
def test_operations_are_within_a_twentieth_of_the_papers(name: str) -> None:
    assert count(name).operations / 1e9 == pytest.approx(PAPER[name][1], rel=0.05)


@pytest.mark.parametrize(("name", "billions"), [("dcformer_nano", 32.9), ("dcformer_naive", 48.1), ("dcformer_tiny", 165.4)])
def test_operations_equal_other_counters(name: str, billions: float) -> None:
    assert count(name).operations / 1e9 == pytest.approx(billions, abs=0.06)


class Toy(Encoder):
    """A model with one layer of every counted kind."""

    widths = (6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 6, (3, 1, 1), padding=(1, 0, 0))
        self.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.batch, self.group, self.layer = nn.BatchNorm3d(6), nn.GroupNorm(1, 6), nn.LayerNorm(6)
        self.linear = nn.Linear(6, 4)

    def grids(self, size: Size) -> list[Size]:
        return [size]

    def encode(self, volume: torch.Tensor) -> list[torch.Tensor]:
        x = self.group(self.batch(self.conv(volume)))
        x = self.depthwise(x.flatten(2, 3)).flatten(2).transpose(1, 2)  # (B, n, 6)
        x = self.layer(x)
        return [self.linear(nn.functional.scaled_dot_product_attention(x, x, x))]


def test_operations_are_those_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.ENCODERS, "toy", (Toy, {}))
    depth, height, width = size = (2, 3, 5)
    cells = depth * height * width
    convolutions = cells * 6 * 3 + cells * 6 * 25
    norms = 3 * 2 * 6 * cells
    attention = 2 * cells * cells * 6
    assert count("toy", size) == Cost(size, (18 + 6) + (150 + 6) + 3 * 12 + (24 + 4), convolutions + norms + attention + cells * 24)


def test_attention_of_a_vit_by_hand() -> None:
    """Counted are the patch embedding and, for each block, q, k, v and output, two MLP layers and two products of all pairs of tokens."""
    with torch.device("meta"):
        encoder = ViT3D((64, 64, 96), (32, 32, 32), 192, 10, 3)
    tokens, width = 2 * 2 * 3, 192
    assert len(encoder.blocks) == 10
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 2 * 2 * tokens * width
    assert count("vit3d_naive", (64, 64, 96)).operations == tokens * 32**3 * width + 10 * block + 2 * tokens * width


def cells(line: str) -> list[str]:
    return line.replace(" %", "").split()


def test_the_table_has_the_papers_figures_beside(run: Run) -> None:
    code, output, error = run("encoders")
    header, *lines = output.splitlines()
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[: len(list_encoders())]}
    assert code == 0 and error == "" and list(rows) == list_encoders()
    assert header.split() == ["encoder", "volume", "params", "M", "paper", "diff", "GFLOPs", "paper", "diff"]
    assert rows["dcformer_naive"] == ["256x512x512", "5.852", "5.85", "+0.0", "48.07", "49.48", "-2.8"]
    assert rows["dcformer_nano"][:4] == ["256x512x512", "0.789", "0.92", "-14.2"]
    assert rows["dcformer_small"][1:] == ["18.245", "172.72"]
    assert rows["vit3d_m3d"][0] == "32x256x256" and rows["ctvit"][0] == "240x480x480"
    assert "at 256x512x512" in " ".join(lines) and "multiply-accumulates" in " ".join(lines)


def test_the_papers_operations_are_shown_at_their_size_only(run: Run) -> None:
    _, output, _ = run("encoders", "dcformer_naive", "--size", "128,256,256")
    assert cells(output.splitlines()[1]) == ["dcformer_naive", "128x256x256", "5.852", "5.85", "+0.0", f"{48.07 / 8:.2f}"]


def test_an_encoder_that_does_not_take_the_size(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    code, output, _ = run("encoders", "dcformer_nano", "ctvit", "--size", "32,48,80")
    assert code == 0 and "ctvit" not in output and cells(output.splitlines()[1])[0] == "dcformer_nano"
    assert "ctvit is left out: a volume of 32x48x80 voxels does not divide" in caplog.text
    code, output, error = run("encoders", "ctvit", "--size", "32,48,80")
    assert (code, output) == (2, "") and "does not divide" in error
    code, output, error = run("encoders", "dcformer_nano", "resnet", "--size", "32,48,80")
    assert (code, output) == (2, "") and "'resnet' is unknown; known: dcformer_nano" in error


def test_measurements_run_in_a_separate_process() -> None:
    result = measure("dcformer_nano", (32, 48, 80), runs=2)
    assert isinstance(result, Measurement) and 0 < result.seconds < 60
    stem = 8 * 12 * 20 * 32 * 4  # bytes of one output of the stem
    assert stem < result.memory < 2**30


def test_the_table_with_measurements(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measure", lambda name, size: Measurement(0.25, 3 * 2**29))
    code, output, _ = run("encoders", "poolformer3d_nano", "--size", "32,48,80", "--measure")
    header, row, *notes = output.splitlines()
    assert code == 0 and header.split()[-3:] == ["s", "volumes/s", "GiB"]
    assert cells(row)[-3:] == ["0.250", "4.000", "1.50"]
    assert "float32" in notes[-1] and "threads" in notes[-1]


def test_a_killed_measurement_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_measure_here", killed)
    with pytest.raises(ValueError, match="measuring dcformer_nano with 32x48x80 voxels was killed, perhaps for lack of memory"):
        measure("dcformer_nano", (32, 48, 80))
