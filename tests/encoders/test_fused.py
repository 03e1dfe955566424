"""The copy that `for_inference` makes, against its encoder."""

import pytest
import torch

from med3dvlm.encoders import build_encoder
from tests.encoders.small import randomised
from tests.encoders.test_dcformer import relative

SMALL = {"blocks": (1, 2, 1, 1), "widths": (6, 8, 10, 12, 14)}
TOLERANCE = 1e-4  # of a stage's spread; 2e-5 measured, at 128x256x256 as well


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(10, 20, 30), (17, 33, 9), (32, 64, 64)])
@pytest.mark.parametrize(
    "options",
    [{}, {"stem_activation": False}, {"stem_stride": 2}, {"stem_layers": 1}, {"kernels": (3, 5, 3, 1)}, {"windows": [[0.2, 0.4]]}],
)
def test_float32_gives_the_same_tokens(options: dict, size: tuple[int, int, int], batch: int) -> None:
    encoder = randomised(build_encoder("dcformer_nano", **SMALL, **options)).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    fast = encoder.for_inference()
    volumes = torch.rand(batch, 1, *size)
    with torch.no_grad():
        for found, expected in zip(fast(volumes), encoder(volumes), strict=True):
            assert relative(found, expected) < TOLERANCE
    assert fast.widths == encoder.widths and fast.grids(size) == encoder.grids(size) and fast.stride == encoder.stride
    assert not any(parameter.requires_grad for parameter in fast.parameters()) and not fast.training
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@pytest.mark.slow
def test_float32_at_the_papers_size() -> None:
    encoder = randomised(build_encoder("dcformer_small")).eval()
    volume = torch.rand(1, 1, 128, 256, 256)
    with torch.no_grad():
        for found, expected in zip(encoder.for_inference()(volume), encoder(volume), strict=True):
            assert relative(found, expected) < TOLERANCE


def test_bfloat16_keeps_the_direction_of_the_features() -> None:
    encoder = randomised(build_encoder("dcformer_nano")).eval()
    fast = encoder.for_inference(torch.bfloat16)
    volumes = torch.rand(3, 1, 32, 64, 64)
    with torch.no_grad():
        for found, expected in zip(fast(volumes), encoder(volumes), strict=True):
            assert found.dtype == torch.bfloat16
            assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.99  # per token; 0.9999 measured


def test_a_model_in_training_is_fused_as_in_evaluation_and_left_in_training() -> None:
    encoder = randomised(build_encoder("dcformer_nano", **SMALL)).train()
    volume = torch.rand(2, 1, 32, 64, 64)
    found = encoder.for_inference()(volume)[-1]
    assert encoder.training
    with torch.no_grad():
        assert relative(found, encoder.eval()(volume)[-1]) < TOLERANCE
