"""Attention in pieces against attention with a full mask: values, gradients, and saved tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from med3dvlm.models import branch_attention, vlm
from med3dvlm.models.branch_attention import NAME, Layout
from med3dvlm.models.vlm_processor import branch_mask
from tests.models.test_branches import CONVERSATIONS, build, features_of

ROWS = torch.tensor(
    [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3, 4, 4], [0, 0, 0, 0, 0, 1, 1, 1, 2, -1, -1, -1, -1], [1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, -1]]
)


def test_pieces_are_whole_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branch_attention, "PIECE", 4)
    layout = Layout.of(ROWS)
    assert layout.shared == [3, 5, 0]
    assert layout.pieces == [[(3, 6), (6, 11), (11, 13)], [(5, 9)], [(0, 3), (3, 7), (7, 11), (11, 12)]]
    assert Layout.of(torch.zeros(1, 5, dtype=torch.int64)).pieces == [[]]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_values_and_gradients_equal_a_loop_over_tokens(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, with four query heads for two key heads."""
    query, key, value = (torch.randn(3, heads, 13, 5, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    weights = torch.randn(3, 13, 4, 5, dtype=torch.float64)
    seen, real = branch_mask(ROWS)[:, 0], ROWS >= 0

    expected = torch.zeros(3, 13, 4, 5, dtype=torch.float64)
    for row, place in real.nonzero().tolist():
        for head in range(4):
            own = seen[row, place]
            scores = key[row, head // 2][own] @ query[row, head, place] * 0.3
            expected[row, place, head] = scores.softmax(0) @ value[row, head // 2][own]
    wanted = torch.autograd.grad((expected * weights)[real].sum(), (query, key, value))

    monkeypatch.setattr(branch_attention, "PIECE", size)
    found, _ = branch_attention.branch_attention(torch.nn.Module(), query, key, value, branch_attention.numbered(ROWS), scaling=0.3)
    torch.testing.assert_close(found[real], expected[real])
    for ours, theirs in zip(torch.autograd.grad((found * weights).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt_neox", "granite", "cohere"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_of_a_model_equal_those_with_a_full_mask(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds also with gradient checkpointing."""
    model, processor = build(family, **{"use_sliding_window": False} if family == "qwen2" else {})
    batch = processor.pad([processor.branch(CONVERSATIONS), processor.branch(CONVERSATIONS[1:])], left=False)
    both = tuple(level.repeat(2, 1, 1) for level in features_of(model, 1)[0])
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, image_features=both).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected: Any = gradients()
    assert model.language_model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(vlm, "DENSE", 0)
    monkeypatch.setattr(branch_attention, "PIECE", 20)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable()
    found = gradients()
    assert model.language_model.config._attn_implementation == NAME
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_layers_with_a_sliding_window_use_a_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm, "DENSE", 0)
    model, processor = build(family)
    batch = processor.pad([processor.branch(CONVERSATIONS)], left=False)
    assert model(**batch, image_features=features_of(model, 1)[0]).loss > 0
    assert model.language_model.config._attn_implementation == "sdpa"


def test_no_tensor_of_token_pairs_is_saved() -> None:
    """For 40 branches of 50 tokens after 48 shared ones, the size of saved tensors grows with tokens, not with pairs of tokens."""
    numbers = torch.cat([torch.zeros(48), torch.arange(1, 41).repeat_interleave(50)]).long()[None]
    states = [torch.randn(1, 2, numbers.shape[1], 4, requires_grad=True) for _ in range(3)]
    largest = 0

    def kept(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        branch_attention.branch_attention(torch.nn.Module(), *states, branch_attention.numbered(numbers))
    assert 0 < largest <= 2 * numbers.numel() * 4 * 4
