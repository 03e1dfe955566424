"""Attention of rows with branches (see Med3DVLMProcessor.branch) in pieces, without a mask of all tokens by all tokens.

The shared part attends to itself; a piece of whole branches attends to the shared part and to itself. No token sees another branch, so that
is the same attention. What is kept for the backward pass are queries, keys and values: each piece is computed again there.

Shapes: B rows, H heads, L tokens, P shared tokens, d width of a head.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_branches"  # as transformers' attn_implementation
PIECE = 512  # tokens; a longer branch is a piece by itself


@dataclass
class Layout:
    """Where the parts of the rows lie.

    Attributes:
        shared: of each row the number of shared tokens.
        pieces: of each row the (start, stop) of its pieces.
        used: whether a layer has asked.
    """

    shared: list[int]
    pieces: list[list[tuple[int, int]]]
    used: bool = False

    @classmethod
    def of(cls, branches: Tensor) -> "Layout":
        """Find the parts of rows by their branch numbers (B, L)."""
        layout = cls([], [])
        for numbers in branches.tolist():
            shared, place = 0, 0
            pieces: list[tuple[int, int]] = []
            for number, members in groupby(numbers):
                start, place = place, place + len(list(members))
                if number == 0:
                    shared = place
                elif number > 0 and pieces and place - pieces[-1][0] <= PIECE:
                    pieces[-1] = (pieces[-1][0], place)
                elif number > 0:
                    pieces.append((start, place))
            layout.shared.append(shared)
            layout.pieces.append(pieces)
        return layout


def numbered(branches: Tensor) -> Tensor:
    """Make branch numbers (B, L) the `attention_mask` (B, 1, 1, L) that this attention reads; transformers passes it on as it is."""
    mask = branches[:, None, None, :].clone()
    mask.branch_layout = Layout.of(branches)  # type: ignore[attr-defined]  # once for all layers
    return mask


def use_pieces(language_model: Any) -> bool:
    """Let a language model of sdpa attend in pieces where it is given `numbered` branches; returns whether it can."""
    config = language_model.config.get_text_config()
    if config._attn_implementation == "sdpa" and language_model._can_set_attn_implementation():
        language_model.set_attn_implementation(NAME)
    return bool(config._attn_implementation == NAME)


def branch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as transformers' sdpa does, in pieces where the mask is of `numbered`.

    Args:
        query: (B, H, L, d).
        key, value: (B, H or a divisor of it, L, d).

    Returns:
        (B, L, H, d); of tokens that fill up zeros.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    if unknown := [name for name in ("softcap", "position_bias", "sliding_window") if options.get(name) is not None]:
        raise ValueError(f"attention over branches does not support {unknown[0]}; load the language model with attn_implementation 'eager'")
    layout: Layout = getattr(attention_mask, "branch_layout", None) or Layout.of(attention_mask[:, 0, 0])
    layout.used = True
    rows = []
    for row, (shared, pieces) in enumerate(zip(layout.shared, layout.pieces, strict=True)):
        queries, keys, values = (states[row : row + 1] for states in (query, key, value))
        parts = [_kept_small(queries[:, :, :shared], [keys[:, :, :shared]], [values[:, :, :shared]], None, dropout, scaling)]
        for start, stop in pieces:
            own, seen = slice(start, stop), (slice(shared), slice(start, stop))
            several = [[states[:, :, part] for part in seen] for states in (keys, values)]
            parts.append(_kept_small(queries[:, :, own], *several, attention_mask[row, 0, 0, own], dropout, scaling))
        done = torch.cat(parts, dim=2)
        rows.append(pad(done, (0, 0, 0, query.shape[2] - done.shape[2])))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _kept_small(*piece: Any) -> Tensor:
    """Attend, saving for the backward pass only the inputs of a piece."""
    if not torch.is_grad_enabled():
        return _attend(*piece)
    attended: Tensor = checkpoint(_attend, *piece, use_reentrant=False, preserve_rng_state=piece[-2] > 0)
    return attended


def _attend(
    query: Tensor, keys: list[Tensor], values: list[Tensor], numbers: Tensor | None, dropout: float, scaling: float | None
) -> Tensor:
    """Attend to keys of the shared part and of a piece, which has these branch numbers; or, without numbers, in the shared part."""
    key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
    groups = query.shape[1] // key.shape[1]
    mask = None
    if numbers is not None:
        own = (numbers[:, None] == numbers[None, :]).tril()
        mask = pad(own, (keys[0].shape[2], 0), value=True)
    return scaled_dot_product_attention(
        query, repeat_kv(key, groups), repeat_kv(value, groups), attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


AttentionInterface.register(NAME, branch_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # of plain masks (B, L)
