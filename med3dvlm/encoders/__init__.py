"""Vision encoders by name.

One contract (`Encoder`): `encoder(x)` with x (B, 1, D, H, W) gives the tokens (B, d*h*w, C) of every stage; `widths`, `grids(size)`, `stride`.
"""

from typing import Any

from med3dvlm.encoders import convnext3d, ctvit, dcformer, poolformer3d, transunet3d, vit3d
from med3dvlm.encoders.base import Encoder, Size, check_size, count_parameters
from med3dvlm.encoders.hierarchy import HierarchicalEncoder

__all__ = ["Encoder", "HierarchicalEncoder", "Size", "build_encoder", "check_size", "count_parameters", "list_encoders"]

# family -> its class and the sizes with blocks and widths
HIERARCHICAL: dict[str, tuple[type[HierarchicalEncoder], dict[str, tuple[tuple[int, ...], tuple[int, ...]]]]] = {
    "dcformer": (dcformer.DCFormer, dcformer.SIZES),
    "convnext3d": (convnext3d.ConvNeXt3D, convnext3d.SIZES),
    "poolformer3d": (poolformer3d.PoolFormer3D, poolformer3d.SIZES),
    "transunet3d": (transunet3d.TransUNet3D, transunet3d.SIZES),
}
# name -> class and arguments; a family that depends on the size of the volumes has it among its arguments
ENCODERS: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
    **{
        f"{family}_{name}": (encoder, {"blocks": blocks, "widths": widths})
        for family, (encoder, sizes) in HIERARCHICAL.items()
        for name, (blocks, widths) in sizes.items()
    },
    **{f"vit3d_{name}": (vit3d.ViT3D, arguments) for name, arguments in vit3d.SIZES.items()},
    "ctvit": (ctvit.CTViT, {"size": (240, 480, 480)}),
}


def list_encoders() -> list[str]:
    return list(ENCODERS)


def build_encoder(name: str, size: Size | None = None, **overrides: Any) -> Encoder:
    """The encoder of that name with freshly initialised weights; `overrides` replace its constructor's arguments.

    Args:
        size: (D, H, W) of the volumes, for families with learned positions; the others take any size. None takes the published one.

    Raises:
        ValueError: the name is unknown, an override is no argument of the encoder, or it does not take that size.
    """
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is unknown; known: {', '.join(ENCODERS)}")
    encoder, arguments = ENCODERS[name]
    if size is not None and "size" in arguments:
        arguments = {**arguments, "size": tuple(size)}
    try:
        return encoder(**{**arguments, **overrides})
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        if not overrides and not isinstance(error, TypeError):
            raise
        raise ValueError(f"encoder {name!r} cannot be built with {overrides}: {error}") from error
