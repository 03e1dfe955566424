"""Receptive fields: the centre of the voxels that change a cell of an encoder, found by gradients."""

import pytest
import torch

from med3dvlm.encoders import HierarchicalEncoder
from tests.encoders.small import SMALL, small_encoder


@pytest.mark.parametrize("family", [family for family in SMALL if not family.startswith(("vit", "ctvit", "transunet"))])
def test_receptive_fields_are_symmetric(family: str) -> None:
    """Tested on stem cells within the volume, since max pooling selects voxels and the border cuts fields off."""
    torch.manual_seed(0)
    encoder, _ = small_encoder(family)
    assert isinstance(encoder, HierarchicalEncoder)
    size = (48, 56, 64)
    volume = torch.rand(1, 1, *size, requires_grad=True)
    grid, (first, step) = encoder.eval().grids(size)[0], encoder.centres(size)[0]
    cell = tuple(cells // 2 for cells in grid)
    tokens = encoder(volume)[0].unflatten(1, grid)
    tokens[0][cell].sum().backward()
    seen = volume.grad[0, 0].nonzero()
    for axis in range(3):
        middle = (seen[:, axis].min() + seen[:, axis].max()).item() / 2
        assert middle == first[axis] + step[axis] * cell[axis], (axis, family)


def test_the_later_grids_of_a_hierarchy_keep_the_first_voxel() -> None:
    """Pooling with kernel 3, stride 2 and padding 1 reads cells 2i - 1, 2i, 2i + 1."""
    encoder, _ = small_encoder("dcformer")
    pool = encoder.stages[0][0].pool
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    size = (48, 56, 64)
    assert encoder.centres(size) == [((0.0,) * 3, (span,) * 3) for span in (4.0, 8.0, 16.0, 32.0, 64.0)]
    for grid, (first, step) in zip(encoder.grids(size), encoder.centres(size), strict=True):
        for cells, voxels, start, width in zip(grid, size, first, step, strict=True):
            assert start + width * (cells - 1) <= voxels - 1  # the last middle lies within the volume


@pytest.mark.parametrize("family", ["vit3d", "vit3d_m3d", "ctvit"])
def test_the_receptive_field_of_a_patch_is_centred_on_it(family: str) -> None:
    encoder, size = small_encoder(family)
    patch = encoder.patch
    for first, step in encoder.centres(size):
        assert step == patch and first == tuple((edge - 1) / 2 for edge in patch)
