"""Where the cells of every encoder look: the middle of the voxels that change them, found by gradients."""

import pytest
import torch

from med3dvlm.encoders import HierarchicalEncoder
from tests.encoders.small import SMALL, small_encoder


@pytest.mark.parametrize("family", [family for family in SMALL if not family.startswith(("vit", "ctvit", "transunet"))])
def test_a_cell_sees_as_far_to_one_side_as_to_the_other(family: str) -> None:
    """Of a stem's cell whose voxels lie within the volume, since max pooling picks and a border cuts off."""
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
    """Pooling of 3 at stride 2 with 1 of padding looks at cells 2i - 1, 2i, 2i + 1."""
    encoder, _ = small_encoder("dcformer")
    pool = encoder.stages[0][0].pool
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
    size = (48, 56, 64)
    assert encoder.centres(size) == [((0.0,) * 3, (span,) * 3) for span in (4.0, 8.0, 16.0, 32.0, 64.0)]
    for grid, (first, step) in zip(encoder.grids(size), encoder.centres(size), strict=True):
        for cells, voxels, start, width in zip(grid, size, first, step, strict=True):
            assert start + width * (cells - 1) <= voxels - 1  # the last middle lies within the volume


@pytest.mark.parametrize("family", ["vit3d", "vit3d_m3d", "ctvit"])
def test_a_patch_looks_at_its_own_middle(family: str) -> None:
    encoder, size = small_encoder(family)
    patch = encoder.patch
    for first, step in encoder.centres(size):
        assert step == patch and first == tuple((edge - 1) / 2 for edge in patch)
