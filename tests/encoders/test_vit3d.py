"""ViT3D against MONAI's ViT and PyTorch's transformer layer with the same weights."""

import re
from itertools import product

import pytest
import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from med3dvlm.encoders import build_encoder
from med3dvlm.encoders.hierarchy import MetaFormerBlock
from med3dvlm.encoders.vit3d import SelfAttention, ViT3D
from tests.encoders.small import randomised

# MONAI's names, which M3D-CLIP's released weights have, and ours
NAMES = (
    (r"^patch_embedding\.position_embeddings$", "positions"),
    (r"^patch_embedding\.patch_embeddings\.1\.", "patch_embedding."),
    (r"^cls_token$", "class_token"),
    (r"\.attn\.qkv\.", ".mixer.qkv."),
    (r"\.attn\.out_proj\.", ".mixer.output."),
    (r"\.mlp\.linear1\.", ".mlp.expand."),
    (r"\.mlp\.linear2\.", ".mlp.reduce."),
)
UNUSED = re.compile(r"^classification_head\.|cross_attn")


def from_monai(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        if not UNUSED.search(name):
            for pattern, ours in NAMES:
                name = re.sub(pattern, ours, name)
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("depth", "ends"), [(8, (2, 4, 6, 8)), (5, (2, 3, 4, 5))])
def test_m3d_equals_monais_vit(depth: int, ends: tuple[int, ...]) -> None:
    size, patch, width, heads = (8, 48, 32), (4, 16, 16), 24, 3
    theirs = ViT(1, size, patch, width, 4 * width, depth, heads, proj_type="perceptron", classification=True, qkv_bias=False).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.1, 0.2)
    ours = build_encoder("vit3d_m3d", size=size, width=width, depth=depth, heads=heads).eval()
    ours.load_state_dict(from_monai(theirs.state_dict()))
    volume = torch.rand(2, 1, *size)
    with torch.no_grad():
        _, hidden = theirs(volume)
        outputs = ours(volume)
        expected = [hidden[end - 1] for end in ends]
        expected[-1] = theirs.norm(expected[-1])
    assert len(outputs) == 4
    for output, reference in zip(outputs, expected, strict=True):
        assert output.shape == (2, 2 * 3 * 2, width)
        assert (output - reference[:, 1:]).abs().max() < 1e-5 * reference.std()


def test_the_default_is_the_released_encoder_of_m3d() -> None:
    with torch.device("meta"):
        theirs = ViT(1, (32, 256, 256), (4, 16, 16), proj_type="perceptron", classification=True)
        ours = build_encoder("vit3d_m3d")
    wanted = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in from_monai(theirs.state_dict()).items()} == wanted
    assert wanted["positions"] == (1, 2048, 768) and ours.grids((32, 256, 256)) == [(8, 16, 16)] * 4
    assert "blocks.0.mixer.qkv.bias" not in wanted


def test_block_equals_pytorchs_transformer_layer_in_value_and_gradient() -> None:
    ours = randomised(MetaFormerBlock(12, SelfAttention(12, 3), nn.LayerNorm)).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", batch_first=True, norm_first=True).double()
    pairs = {
        "norm1": "norm1", "norm2": "norm2", "mixer.qkv": "self_attn.in_proj_", "mixer.output": "self_attn.out_proj",
        "mlp.expand": "linear1", "mlp.reduce": "linear2",
    }  # fmt: skip
    names = {
        f"{one}.{kind}": f"{other}{'' if other.endswith('_') else '.'}{kind}"
        for (one, other), kind in product(pairs.items(), ("weight", "bias"))
    }
    theirs.load_state_dict({names[name]: tensor for name, tensor in ours.state_dict().items()})
    x = torch.randn(2, 3, 1, 4, 12, dtype=torch.float64)
    y, expected = ours(x), theirs(x.flatten(1, 3))
    torch.testing.assert_close(y.flatten(1, 3), expected)
    direction = torch.randn_like(expected)
    (y.flatten(1, 3) * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[names[name]].grad)


def test_a_token_is_its_projected_patch_plus_its_position() -> None:
    size, patch = (4, 9, 10), (2, 3, 5)
    encoder = ViT3D(size, patch, width=6, depth=4, heads=2)
    for block in encoder.blocks:  # leaves what enters it
        nn.init.zeros_(block.mixer.output.weight)
        nn.init.zeros_(block.mlp.reduce.weight)
    volume = torch.rand(2, 1, *size)
    with torch.no_grad():
        first = encoder(volume)[0]
        for number, (a, b, c) in enumerate(product(range(2), range(3), range(2))):
            voxels = volume[:, 0, 2 * a : 2 * a + 2, 3 * b : 3 * b + 3, 5 * c : 5 * c + 5].reshape(2, 30)
            expected = encoder.patch_embedding(voxels) + encoder.positions[0, number]
            torch.testing.assert_close(first[:, number], expected)
