"""Vision encoders by name.

One contract: `encoder(x)` with x (B, 1, D, H, W) gives the tokens (B, d*h*w, C) of every stage; `widths`, `grids(size)`, `stride`.
"""

from typing import Any

from med3dvlm.encoders.dcformer import SIZES, DCFormer
from med3dvlm.encoders.hierarchy import HierarchicalEncoder, Size, count_parameters

__all__ = ["HierarchicalEncoder", "Size", "build_encoder", "count_parameters", "list_encoders"]


def list_encoders() -> list[str]:
    return [f"dcformer_{size}" for size in SIZES]


def build_encoder(name: str, **overrides: Any) -> HierarchicalEncoder:
    """The encoder of that name with freshly initialised weights; `overrides` replace its constructor's arguments.

    Raises:
        ValueError: the name is unknown, or an override is no argument of the encoder.
    """
    if name not in list_encoders():
        raise ValueError(f"encoder {name!r} is unknown; known: {', '.join(list_encoders())}")
    blocks, widths = SIZES[name.removeprefix("dcformer_")]
    arguments = {"blocks": blocks, "widths": widths, **overrides}
    try:
        return DCFormer(**arguments)
    except TypeError as error:
        raise ValueError(f"encoder {name!r} cannot be built with {overrides}: {error}") from error
