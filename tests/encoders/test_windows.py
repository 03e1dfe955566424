"""Intensity windows: further input channels of an encoder's stem."""

import pytest
import torch

from med3dvlm.encoders import build_encoder
from med3dvlm.encoders.hierarchy import windowed
from tests.encoders.small import SMALL, randomised

FAMILIES = ["dcformer", "convnext3d", "poolformer3d", "transunet3d"]
WINDOWS = [[0.5, 0.75], [0.0, 0.25]]


def test_a_window_goes_from_0_at_its_low_end_to_1_at_its_high_one() -> None:
    values = [0.0, 0.2, 0.5, 0.6, 0.75, 1.0]
    seen = windowed(torch.tensor(values).view(1, 1, 1, -1, 1), WINDOWS)[0, 0, 0]
    expected = [[x, min(max((x - 0.5) / 0.25, 0), 1), min(max(x / 0.25, 0), 1)] for x in values]
    torch.testing.assert_close(seen, torch.tensor(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_outside_of_all_windows_are_visible_in_the_volume_only(family: str) -> None:
    """Without the volume's own channel, values outside of the windows change nothing; values within do."""
    name, size, overrides = SMALL[family]
    torch.manual_seed(0)
    encoder = randomised(build_encoder(name, size=size, windows=WINDOWS, **overrides)).double().eval()
    first = next(parameter for parameter in encoder.parameters() if parameter.ndim > 2)
    inputs = first.shape[1]
    assert inputs == 3
    volume = 0.3 + 0.15 * torch.rand(1, 1, *size, dtype=torch.float64)  # between the two windows
    other = 0.3 + 0.15 * torch.rand(1, 1, *size, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(encoder(volume)[0], encoder(other)[0])
        for parameter in encoder.stem.parameters():
            if parameter.ndim > 2 and parameter.shape[1] == inputs:
                parameter[:, 0] = 0
        for one, two in zip(encoder(volume), encoder(other), strict=True):
            torch.testing.assert_close(one, two)
        assert not torch.allclose(encoder(volume)[0], encoder(volume + 0.3)[0])


@pytest.mark.parametrize("window", [[0.5, 0.5], [0.75, 0.5], [0.5]])
def test_a_window_without_width_is_an_error(window: list[float]) -> None:
    with pytest.raises(ValueError, match=r"low < high"):
        build_encoder("dcformer_nano", windows=[window])
