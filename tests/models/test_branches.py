"""Conversations that share a row: attention between them, their weights in the loss, and models that cannot share rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from med3dvlm import Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, VolumeProcessor
from med3dvlm.datasets.conversations import ConversationCollator
from med3dvlm.evaluation import answer_likelihoods, models
from med3dvlm.models.vlm import count_items
from med3dvlm.models.vlm_processor import IGNORED, Message, answer_lengths
from tests.tiny_parts import TEMPLATES, tokenizer, turn

SIZE = (24, 40, 32)
WINDOW = 5
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
# With a window where the family has one, much shorter than a row.
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}
CONVERSATIONS = [
    turn("Which organ has a lesion?", "Liver"),
    [*turn("Where?", "Left, 12 mm"), *turn("Sure?", "Yes")],
    turn("An effusion?", "No"),
    turn("Write the report.", "The heart is not enlarged. Both lungs are clear. No pleural effusion."),
]


def build(family: str = "qwen2", splice: str = "mask", **settings: Any) -> tuple[Med3DVLM, Med3DVLMProcessor]:
    processor = Med3DVLMProcessor(VolumeProcessor(size=SIZE), tokenizer(TEMPLATES["with_system"]))
    text_config = AutoConfig.for_model(
        family, vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=512, initializer_range=0.3, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        **FAMILIES.get(family, {}) | settings,
    )  # fmt: skip
    config = Med3DVLMConfig(
        "dcformer_nano", {"widths": [4, 4, 8, 8, 16], "layer_scale": 0.5}, SIZE, projector="low_high_mlp",
        text_config=text_config, image_token_id=processor.image_token_id, image_splice=splice,
    )  # fmt: skip
    processor.num_image_tokens = config.num_image_tokens
    model = Med3DVLM(config, language_model=AutoModelForCausalLM.from_config(text_config)).eval()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.mul_(5)
    return model, processor


def features_of(model: Med3DVLM, volumes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        return [model.encode_image(torch.rand(1, 1, *SIZE, dtype=model.dtype)) for _ in range(volumes)]


def alone(model: Med3DVLM, processor: Med3DVLMProcessor, messages: Sequence[Message], features: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (L, V) and labels (L) of one conversation in its own row."""
    coded = processor.encode(messages)
    ids = torch.tensor([coded["input_ids"]])
    return model(ids, torch.ones_like(ids), image_features=features).logits[0], torch.tensor(coded["labels"])


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager") if (family, attention) != ("gemma2", "sdpa")],
)
def test_a_branch_has_the_logits_of_its_conversation_alone(family: str, attention: str) -> None:
    """This includes language models with a sliding window, whose own mask is used for a single conversation and ours for branches."""
    model, processor = build(family)
    model.set_attn_implementation(attention)
    assert model.language_model.config._attn_implementation == attention
    (features,) = features_of(model, 1)
    batch = processor.pad([processor.branch(CONVERSATIONS), processor.branch(CONVERSATIONS[1:])], left=False)
    branches = batch["branches"]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "branches")}
    both = tuple(level.repeat(2, 1, 1) for level in features)
    with torch.no_grad():
        logits = model(**inputs, image_features=both).logits
        for row, conversations in enumerate((CONVERSATIONS, CONVERSATIONS[1:])):
            for number, messages in enumerate(conversations, start=1):
                expected, _ = alone(model, processor, messages, features)
                own = logits[row, branches[row] == number]
                torch.testing.assert_close(own, expected[-len(own) :], atol=2e-4, rtol=1e-3)
        embeds = model.embed(torch.tensor([processor.encode(CONVERSATIONS[0])["input_ids"]]), features)
        torch.testing.assert_close(  # and, as its `generate` has them, scaled or capped
            alone(model, processor, CONVERSATIONS[0], features)[0],
            model.language_model(inputs_embeds=embeds).logits[0],
            atol=1e-4,
            rtol=1e-3,
        )


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_the_sliding_window_matters(family: str) -> None:
    """Otherwise the test above would prove nothing."""
    model, processor = build(family)
    (features,) = features_of(model, 1)
    with torch.no_grad():
        windowed, _ = alone(model, processor, CONVERSATIONS[3], features)
        model.language_model.config.sliding_window = 500
        whole, _ = alone(model, processor, CONVERSATIONS[3], features)
    assert (windowed[-1] - whole[-1]).abs().max() > 0.05


def test_unsupported_models_refuse_rows_of_several_conversations() -> None:
    branches = torch.tensor([[0, 1, 2]])
    ids, positions = torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 1]])
    plain, _ = build("llama")
    assert plain.packing_obstacle is None
    with pytest.raises(ValueError, match=r"need the position_ids that Med3DVLMProcessor.branch gives"):
        plain(ids, branches=branches)
    for name, value, sentence in (
        ("layer_types", ["chunked_attention", "full_attention"], r"\(llama\) has layers of chunked_attention, for which there is no mask"),
        ("attention_chunk_size", 8, r"has layers of chunked_attention"),
        (
            "_attn_implementation",
            "flash_attention_2",
            r"flash_attention_2 takes no mask that keeps conversations apart \(sdpa and eager do\)",
        ),
    ):
        model, _ = build("llama")
        setattr(model.language_model.config, name, value)
        with pytest.raises(ValueError, match=rf"cannot share a row: .*{sentence}.*give each a row of its own and a mask \(B, L\)"):
            model(ids, branches=branches, position_ids=positions)
    assert "has layers of linear_attention" in str(build("mamba", state_size=4)[0].packing_obstacle)
    assert "(bloom) goes by the order of tokens, not by position_ids" in str(build("bloom", n_head=2)[0].packing_obstacle)
    published, _ = build(splice="published")
    with pytest.raises(ValueError, match="image_splice 'published' the image takes the place of the first token of the first conversation"):
        published(ids, branches=branches, position_ids=positions)


@pytest.mark.parametrize("splice", ["mask", "published"])
def test_likelihoods_do_not_depend_on_the_order_of_the_choices(splice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They equal those of one conversation at a time, whatever shares the row."""
    model, processor = build(splice=splice)
    choices = [turn("Where?", answer) for answer in ("Left", "Right lobe", "In both lungs, 12 mm", "The heart")]
    asked = [choices, choices[::-1] + CONVERSATIONS[:1]]
    features = features_of(model, 2)
    found = answer_likelihoods(model, processor, asked, features)
    permuted = answer_likelihoods(model, processor, [row[::-1] for row in asked], features)
    monkeypatch.setattr(models, "CONVERSATIONS", 2)
    short = answer_likelihoods(model, processor, asked, features)
    for row, conversations in enumerate(asked):
        for place, messages in enumerate(conversations):
            with torch.no_grad():
                logits, labels = alone(model, processor, messages, features[row])
            expected = -cross_entropy(logits[:-1].double(), labels[1:], ignore_index=IGNORED).item()
            assert found[row][place] == pytest.approx(expected, abs=1e-5)
            assert permuted[row][-1 - place] == pytest.approx(expected, abs=1e-5)
            assert short[row][place] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_packed_rows_and_rows_of_one_give_the_same_loss_and_gradients(weighting: str) -> None:
    """In float64, in one batch or several, they equal a loop over the conversations."""
    model, processor = build("gpt_neox")  # whose norms compute in float64, too
    model.double()
    asked = [CONVERSATIONS, CONVERSATIONS[2:]]
    seen = [tuple(level[0] for level in levels) for levels in features_of(model, 2)]
    packed = [{"conversations": asked[row], "features": seen[row]} for row in (0, 1)]
    single = [{"conversations": [messages], "features": seen[row]} for row in (0, 1) for messages in asked[row]]
    collate = ConversationCollator(processor, 300, weighting)

    losses = []
    for row in single:
        logits, labels = alone(model, processor, row["conversations"][0], tuple(level[None] for level in row["features"]))
        losses.append(cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="none")[labels[1:] != IGNORED])
    expected = torch.cat(losses).mean() if weighting == "token" else torch.stack([loss.mean() for loss in losses]).mean()
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("projector.") for name in gradients)

    for batches in ([packed], [packed[:1], packed[1:]], [single], [single[:1], single[1:4], single[4:]], [packed[:1], single[4:]]):
        collated = [collate(batch) for batch in batches]
        items = sum(count_items(batch) for batch in collated)
        assert items == (sum(map(len, losses)) if weighting == "token" else len(single))
        model.zero_grad()
        total = 0.0
        for batch in collated:
            assert batch["attention_mask"].ndim == 2 and ("branches" in batch) == ("position_ids" in batch)
            loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(expected.item(), rel=1e-9)
        for name, gradient in gradients.items():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-7, atol=1e-9)
        if len(batches) == 1:  # without a count the batch is the whole step
            assert model(**collated[0]).loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_answer_lengths_equal_a_loop() -> None:
    branches = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 2, -1, -1, -1]])
    labels = torch.tensor([[7, 7, -100, 7, 7, -100, 7], [7, 7, 7, -100, -100, -100, -100]])
    lengths = answer_lengths(labels, branches)
    for row in range(2):
        predicted = [place for place in range(1, 7) if labels[row, place] != IGNORED]  # nothing predicts a row's first token
        for place in range(7):
            same = [other for other in predicted if branches[row, other] == branches[row, place]]
            assert lengths[row, place] == (len(same) if place in predicted else 0)
    assert count_items({"labels": labels, "answer_lengths": lengths}) == 4 and count_items({"labels": labels}) == 6


def test_an_unknown_weighting_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_weighting 'answer' is unknown; known: token, conversation"):
        ConversationCollator(build()[1], 100, "answer")
