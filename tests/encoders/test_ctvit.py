"""CT-ViT against plain loops over its definition; the released numbers are compared in test_published_layout."""

import math

import pytest
import torch
from torch import Tensor, nn

from med3dvlm import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.encoders import build_encoder
from med3dvlm.encoders.ctvit import CosineAttention, CTViT, CTViTBlock, GatedMLP, PositionBias, PositionConv
from tests.tiny_parts import language_model

PATCH = (2, 3, 5)
SIZE = (6, 12, 10)  # a grid of 3 x 4 x 2
OPTIONS = {"dim": 12, "codebook_size": 7, "patch": PATCH, "spatial_depth": 2, "temporal_depth": 1, "heads": 2, "head_width": 4}


def small(**others: object) -> CTViT:
    """A small CT-ViT with weights of ordinary size in every parameter, so that every part matters."""
    encoder = CTViT(**OPTIONS | others)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return encoder.eval()


def test_outputs_grids_and_registry() -> None:
    encoder = build_encoder("ctvit", SIZE, **OPTIONS)
    assert encoder.grids(SIZE) == [(3, 4, 2)] * 2
    assert (encoder.widths, encoder.stride) == ((12, 12), 30)
    tokens, codes = encoder.eval()(torch.rand(2, 1, *SIZE))
    assert tokens.shape == codes.shape == (2, 24, 12)


@pytest.mark.parametrize("size", [(7, 12, 10), (6, 10, 10), (6, 12, 3), (0, 12, 10)])
def test_a_size_that_does_not_divide_is_refused_before_and_at_the_call(size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"patches of 2x3x5|positive"):
        build_encoder("ctvit", size, **OPTIONS)
    if all(size):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}x{size[2]} voxels"):
            small()(torch.rand(1, 1, *size))


def test_a_patch_holds_its_voxels_in_the_order_of_the_axes() -> None:
    encoder = small(spatial_depth=0, temporal_depth=0)
    volume = torch.rand(1, 1, *SIZE)
    patch = volume[0, 0, 2:4, 6:9, 5:10].flatten()  # cell (1, 2, 1) of the grid
    token = encoder.temporal_norm(encoder.spatial_norm(encoder.patch_embedding(patch)))
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume)[0][0, (1 * 4 + 2) * 2 + 1], token)


def test_position_bias_is_its_mlp_on_every_pair_of_cells() -> None:
    bias = PositionBias(8, 3)
    cells = [(row, column) for row in range(3) for column in range(4)]
    with torch.no_grad():
        table = bias(3, 4)
        for i, (row, column) in enumerate(cells):
            for j, (other_row, other_column) in enumerate(cells):
                offset = [math.copysign(math.log(abs(n) + 1), n) for n in (row - other_row, column - other_column)]
                torch.testing.assert_close(table[:, i, j], bias.layers(torch.tensor(offset)))


def test_positional_convolution_sees_no_later_layer() -> None:
    convolution = PositionConv(4)
    x = torch.rand(1, 5, 4, 3, 4)
    later = x.clone()
    later[:, 3:] = 0
    with torch.no_grad():
        torch.testing.assert_close(convolution(later)[:, :3], convolution(x)[:, :3])
        by_hand = convolution.bias + sum(
            convolution.weight[:, 0, dt, dy, dx] * x[0, dt, dy, dx] for dt in range(3) for dy in range(3) for dx in range(3)
        )  # at cell (2, 1, 1): itself and the two layers before it
        torch.testing.assert_close(convolution(x)[0, 2, 1, 1], by_hand)


def test_attention_is_a_softmax_over_cosines_times_eight() -> None:
    attention = CosineAttention(6, heads=2, head_width=3)
    nn.init.normal_(attention.query_scale)
    nn.init.normal_(attention.key_scale)
    x, bias = torch.randn(2, 5, 6), torch.randn(2, 5, 5)
    keys, values = attention.key_value(x).chunk(2, dim=-1)  # of the tokens as they are
    queries = attention.query(attention.norm(x))
    expected = torch.empty(2, 5, 6)
    for row in range(2):
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            for i in range(5):
                q = queries[row, i, part] / queries[row, i, part].norm() * attention.query_scale
                scores = [
                    8 * q @ (keys[row, j, part] / keys[row, j, part].norm() * attention.key_scale) + bias[head, i, j] for j in range(5)
                ]
                expected[row, i, part] = torch.stack(scores).softmax(0) @ values[row, :, part]
    torch.testing.assert_close(attention(x, bias), attention.output(expected))


def test_mlp_is_gated() -> None:
    mlp = GatedMLP(6)
    x = torch.randn(3, 6)
    hidden = mlp.expand(mlp.norm(x))
    assert hidden.shape == (3, 2 * 16)  # 2/3 of four times the width, rounded down
    torch.testing.assert_close(mlp(x), mlp.reduce(hidden[:, :16] * nn.functional.gelu(hidden[:, 16:])))


def test_temporal_blocks_attend_within_columns_except_for_the_released_positions() -> None:
    block = CTViTBlock(4, heads=1, head_width=4)
    x = torch.randn(1 * 2 * 3, 5, 4)  # six columns of five layers
    with torch.no_grad():
        positions = block.positions(x.reshape(1, 5, 2, 3, 4)).reshape(x.shape)  # read as if layers came first
        after = x + positions
        after = after + block.attention(after, None)
        torch.testing.assert_close(block(x, (1, 5, 2, 3)), after + block.mlp(after))


def test_codes_are_nearest_by_cosine() -> None:
    encoder = small()
    nn.init.normal_(encoder.codebook)
    tokens = torch.randn(2, 9, 12)
    expected = torch.empty_like(tokens)
    for row in range(2):
        for i in range(9):
            cosines = [torch.cosine_similarity(tokens[row, i], entry, dim=0) for entry in encoder.codebook]
            expected[row, i] = encoder.codebook[int(torch.stack(cosines).argmax())]
    assert torch.equal(encoder.quantise(tokens), expected)


def gradients(encoder: CTViT, volume: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    sum((tokens**2).mean() for tokens in encoder(volume)).backward()
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters()}


def test_gradients_pass_the_codebook_and_reach_every_parameter() -> None:
    encoder = small().train()
    tokens = torch.randn(1, 4, 12, requires_grad=True)
    encoder.quantise(tokens).sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))
    torch.testing.assert_close(encoder.quantise(tokens), small_codes(encoder, tokens))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(encoder, torch.rand(2, 1, *SIZE)).values())


def small_codes(encoder: CTViT, tokens: Tensor) -> Tensor:
    return encoder.eval().quantise(tokens)


def test_gradient_checkpointing_changes_nothing() -> None:
    encoder, volume = small().train(), torch.rand(2, 1, *SIZE)
    before = gradients(encoder, volume)
    encoder.gradient_checkpointing = True
    after = gradients(encoder, volume)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_precision_is_close_to_float32() -> None:
    encoder, volume = small(), torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        full, half = encoder(volume)[0], encoder.for_inference(torch.bfloat16)(volume)[0]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = encoder(volume)[0]
    for found in (half, mixed):
        assert (found.float() - full).abs().max() < 0.2 * full.std()


def clip(**settings: object) -> Med3DCLIP:
    text = language_model().model  # any text model will do here
    return Med3DCLIP(Med3DCLIPConfig("ctvit", dict(OPTIONS), SIZE, text_config=text.config, projection_dim=9, **settings), text).eval()


def test_frames_are_averaged_and_the_rest_flattened() -> None:
    model = clip(image_pooling="frames", projection_bias=False, loss="clip")
    assert model.image_projection.weight.shape == (9, 4 * 2 * 12)
    assert model.image_projection.bias is None and model.text_projection.bias is None
    volume = torch.rand(2, 1, *SIZE)
    with torch.no_grad():
        codes = model.vision_encoder(volume)[-1]
        pooled = torch.stack([sum(codes[row, 8 * frame : 8 * frame + 8] for frame in range(3)).flatten() / 3 for row in range(2)])
        torch.testing.assert_close(model.encode_image(volume), nn.functional.normalize(pooled @ model.image_projection.weight.T))
    deeper = torch.rand(1, 1, 10, 12, 10)  # the number of layers is free
    assert model.encode_image(deeper).shape == (1, 9)


def test_unknown_poolings_are_refused() -> None:
    with pytest.raises(ValueError, match="'max' is unknown; known: mean, frames"):
        Med3DCLIPConfig(image_pooling="max")
    with pytest.raises(ValueError, match="takes the last stage alone"):
        Med3DCLIPConfig(image_pooling="frames", image_stages=2)


def test_older_configurations_keep_their_meaning() -> None:
    older = Med3DCLIPConfig("dcformer_nano", size=SIZE).to_dict()
    for added in ("image_pooling", "projection_bias"):
        del older[added]
    config = Med3DCLIPConfig.from_dict(older)
    assert (config.image_pooling, config.projection_bias) == ("mean", True)
