"""DCFormer written down as the DCFormer paper prints it (Algorithm 1 and section "Formulation of the DCFormer block"): what `dcformer`
is measured against and compared with. Conv3d and BatchNorm3d in torch's default memory layout, channels first: (B, C, D, H, W).

`literal(encoder)` gives a DCFormer of ours in this form with the same weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from med3dvlm.encoders.dcformer import DCFormerBlock
from med3dvlm.encoders.decomposed import DecomposedConv
from med3dvlm.encoders.hierarchy import Downsample


class LiteralConv(nn.Module):
    """Algorithm 1: three Conv3d branches, each with its BatchNorm3d, summed."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        branches = []
        for axis in range(3):
            kernel: Any = tuple(kernel_size if other == axis else 1 for other in range(3))
            padding: Any = tuple(kernel_size // 2 if other == axis else 0 for other in range(3))
            convolution = nn.Conv3d(inputs, outputs, kernel, stride, padding, groups=groups)
            branches.append(nn.Sequential(convolution, nn.BatchNorm3d(outputs)))
        self.depth, self.height, self.width = branches

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(x) + self.height(x) + self.width(x)


class LiteralBlock(nn.Module):
    """Token mixer, then the MLP over the channels of every token, scaled and added."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.mixer = LiteralConv(channels, channels, kernel_size, groups=channels)
        self.mlp = nn.ModuleDict({"expand": nn.Linear(channels, 4 * channels), "reduce": nn.Linear(4 * channels, channels)})
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mixer(x).flatten(2).transpose(1, 2)  # (B, d*h*w, C)
        tokens = self.scale * self.mlp["reduce"](nn.functional.gelu(self.mlp["expand"](tokens)))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class LiteralDownsample(nn.Module):
    """Max pooling, then a 1x1x1 convolution to the next width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool, self.project = nn.MaxPool3d(3, 2, 1), nn.Conv3d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.pool(x))


class LiteralDCFormer(nn.Module):
    """Stem and stages with the submodule names of `med3dvlm.encoders.DCFormer`; (B, 1, D, H, W) -> the tokens (B, d*h*w, C) of each."""

    def __init__(self, stem: nn.Sequential, stages: nn.ModuleList) -> None:
        super().__init__()
        self.stem, self.stages = stem, stages

    def forward(self, volume: Tensor) -> list[Tensor]:
        x = volume
        outputs = []
        for stage in (self.stem, *self.stages):
            x = stage(x)
            if x.requires_grad:
                # In torch 2.14 on CPUs the gradients of one volume are wrong where they come with channels last, as the transposed tokens' do.
                x.register_hook(lambda gradient: gradient.contiguous())
            outputs.append(x)
        return [output.flatten(2).transpose(1, 2) for output in outputs]


def literal(encoder: Any) -> LiteralDCFormer:
    """A DCFormer of ours in the paper's form with the same weights, training or not as the encoder is."""
    model = LiteralDCFormer(
        nn.Sequential(*(_literal(layer) for layer in encoder.stem)),
        nn.ModuleList(nn.Sequential(*(_literal(layer) for layer in stage)) for stage in encoder.stages),
    )
    ours, theirs = encoder.state_dict(), model.state_dict()
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"the encoder has weights that the literal form lacks or the other way round: {sorted(ours.keys() ^ theirs.keys())[:4]}"
        )
    model.load_state_dict({name: tensor.reshape(theirs[name].shape) for name, tensor in ours.items()})
    return model.to(next(encoder.parameters()).dtype).train(encoder.training)


def _literal(layer: Any) -> nn.Module:
    if isinstance(layer, DecomposedConv):
        convolution = layer.depth[0]
        outputs, inputs_per_group, kernel_size = convolution.weight.shape
        return LiteralConv(inputs_per_group * convolution.groups, outputs, kernel_size, convolution.stride, convolution.groups)
    if isinstance(layer, DCFormerBlock):
        channels, _, kernel_size = layer.mixer.depth[0].weight.shape  # type: ignore[index, union-attr]
        return LiteralBlock(channels, kernel_size)
    if isinstance(layer, Downsample):
        return LiteralDownsample(layer.project.in_features, layer.project.out_features)
    if isinstance(layer, nn.GELU):
        return nn.GELU()
    raise TypeError(f"{type(layer).__name__} has no literal form here")
