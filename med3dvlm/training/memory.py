"""Measure the memory of a training step beside weights, gradients and optimiser, by running the model's forward and backward on the meta
device.

Weights and activations are on the meta device, where tensors have shapes alone; token ids, labels and masks are real, since shapes follow from them.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LOGITS, ACTIVATIONS = "logits", "activations"


class Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors that live at once, without those that existed before.

    Attributes:
        parts: at the moment of most bytes, those of tensors over the vocabulary (LOGITS) and of all others (ACTIVATIONS).

    Args:
        vocabulary: the size by which logits are known.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.live: Counter[str] = Counter()
        self.parts: Counter[str] = Counter()
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if (
            func is torch.ops.aten.index.Tensor
            or func is torch.ops.aten.index_put.default
            or func is torch.ops.aten._index_put_impl_.default
        ):
            args = (args[0], _whole_numbers(args[1]), *args[2:])  # a mask on the meta device says nothing of how many it takes
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta and not args[0].is_floating_point():
            kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # it stays real
        elif any(leaf.is_meta for leaf in leaves):
            args, kwargs = tree_map(_without_numbers, (args, kwargs))
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf)
        return result

    def watch(self, *tensors: Tensor) -> None:
        """Leave out these tensors, which exist anyway."""
        self.known.update(id(tensor.untyped_storage()) for tensor in tensors)
        self.kept = [*getattr(self, "kept", ()), *(tensor.untyped_storage() for tensor in tensors)]

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.known:
            return
        kind = LOGITS if self.vocabulary and tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary else ACTIVATIONS
        size = storage.nbytes()
        self.known.add(id(storage))
        self.live[kind] += size
        weakref.finalize(storage, self._free, id(storage), kind, size)
        if self.live.total() > self.parts.total():
            self.parts = Counter(self.live)

    def _free(self, number: int, kind: str, size: int) -> None:
        self.known.discard(number)
        self.live[kind] -= size


@contextmanager
def _as_on_a_device() -> Iterator[None]:
    """Attention as the kernels of GPUs and CPUs do it, which never hold scores of all pairs, for which torch has none on the meta device; nor
    has it autocast there, which no model's own forward turns on."""
    functional: Any = nn.functional
    with (
        patch.object(functional, "scaled_dot_product_attention", _attention),
        patch.object(torch, "autocast", lambda *_, **__: nullcontext()),
        patch.object(shapes, "meta_nonzero_assume_all_nonzero", True),  # of prompts that count in a loss
    ):
        yield


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Any = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    if query.ndim == 3:  # without heads
        query, key, value = (one.unsqueeze(1) for one in (query, key, value))
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale).squeeze(1)
    if query.shape[-1] != value.shape[-1]:  # which the other does not take
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, 0.0, is_causal, scale=scale)[0]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def peak_of_step(model: nn.Module, batch: dict[str, Any], vocabulary: int = 0) -> Counter[str]:
    """Return the bytes at the peak of one forward and backward, beside weights, gradients and the batch itself, by LOGITS and ACTIVATIONS.

    Args:
        model: on the meta device, in training mode; what requires a gradient is what trains.
        batch: arguments of its forward; floating-point tensors on the meta device, whole numbers real.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    peak = Peak(vocabulary)
    with torch.no_grad():
        peak.watch(*model.parameters(), *model.buffers(), *(one.grad for one in model.parameters() if one.grad is not None))
        peak.watch(*(one for one in tree_leaves(batch) if isinstance(one, Tensor)))
    with _as_on_a_device(), peak:
        loss = model(**batch).loss
        loss.backward()
        del loss
    model.zero_grad(set_to_none=True)
    return peak.parts


def _whole_numbers(indices: Any) -> Any:
    places: list[Any] = []
    for index in indices:
        places += index.nonzero().unbind(1) if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta else [index]
    return places


def _without_numbers(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.ndim else leaf
