"""Differences between families of language models: the attention of their layers, and the scale of their head's logits.

transformers' names of settings are asked for, never the name of a family.

Shapes: B rows, L tokens, E width, V vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor


def packing_obstacle(language_model: Any) -> str | None:
    """Return why several conversations cannot share a row of this language model, as a clause; None where they can."""
    config, decoder = language_model.config.get_text_config(), language_model.get_decoder()
    if "flash" in (name := str(config._attn_implementation)):
        return f"{name} takes no mask that keeps conversations apart (sdpa and eager do)"
    if unknown := sorted(attention_kinds(config) - {"full_attention", "sliding_attention"}):
        return f"the language model ({config.model_type}) has layers of {', '.join(unknown)}, for which there is no mask that does so"
    if getattr(decoder, "_is_stateful", False) or "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"the language model ({config.model_type}) goes by the order of tokens, not by position_ids and a mask"
    return None


def attention_kinds(config: Any) -> set[str]:
    """Return the kinds of attention of a language model's layers, in the words of transformers."""
    if kinds := getattr(config, "layer_types", None):
        return set(kinds)
    if getattr(config, "attention_chunk_size", None):
        return {"chunked_attention"}
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return {"local_attention"}
    if getattr(config, "alibi", False):  # Falcon, Bloom, MPT: their biases go by places in the row
        return {"alibi"}
    return {"sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"}


def branch_scores(
    config: Any, mask: Tensor, position_ids: Tensor, dtype: torch.dtype, key_positions: Tensor | None = None
) -> Tensor | dict[str, Tensor]:
    """Convert (B, 1, L, L) from `branch_mask` to the numbers added to the attention's scores (eager attention would add True as 1).

    A window counts positions, not places in the row: every branch continues where the image ends. A dict by kind where layers differ.
    With `key_positions` (B, K), of tokens that were read before too, the mask is (B, 1, L, K).
    """
    scores = {}
    keys = position_ids if key_positions is None else key_positions
    for kind in attention_kinds(config):
        seen = mask
        if kind == "sliding_attention":
            distance = position_ids[:, None, :, None] - keys[:, None, None, :]
            seen = mask & (distance < config.sliding_window)
        scores[kind] = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return scores if len(scores) > 1 else scores.popitem()[1]


def scaled_logits(language_model: Any, hidden: Tensor, own: tuple[int, Tensor] | None = None) -> Tensor:
    """Return logits (..., V) of (..., E) as the language model's own forward does: some families scale or cap them.

    Args:
        own: a token and its row (E), in the place of the head's.
    """
    config, logits = language_model.config.get_text_config(), language_model.get_output_embeddings()(hidden)
    if own is not None:
        logits[..., own[0]] = (hidden @ own[1].to(hidden.dtype)).to(logits.dtype)
    if (factor := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        logits = logits * factor
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits
