"""Med3DVLMProcessor: labels, truncation, image tokens, and several conversations in one row."""

import re
import string
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer

from med3dvlm import Med3DCLIPProcessor, Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, Volume, VolumeProcessor
from med3dvlm.models.vlm_processor import IGNORED, MARK, Message, branch_mask
from med3dvlm.training.contrastive import common_words
from tests.tiny_parts import CHATML, END, INSTRUCT, TEMPLATES, TEXTS, language_model, tokenizer, turn

SIZE = (24, 40, 32)
IMAGE_TOKENS = 12
TOLERANCE = 1e-4  # of logits with a spread of about 2; 1.7e-5 measured
CONVERSATION = [
    *turn("Which organ has a lesion?", "The liver:  12 mm, 3 of them."),  # a double space and numbers: tokens of nothing but a space
    *turn("Und wo – genau?", "Im rechten Lappen.\n\nSonst überall nichts."),  # characters of several bytes, an empty line
    *turn("Sure?", "Yes"),
]
ANSWERS = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]


def processor(template: str = CHATML, trim_offsets: bool = False) -> Med3DVLMProcessor:
    return Med3DVLMProcessor(VolumeProcessor(size=SIZE), tokenizer(template, trim_offsets), IMAGE_TOKENS)


def decode(words: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return words.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def labelled_runs(row: dict[str, list[int]], words: PreTrainedTokenizerFast) -> list[str]:
    """Return the labelled spans as text; a label equals its token."""
    runs = [
        list(run)
        for labelled, run in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED)
        if labelled
    ]
    assert all(token == label for run in runs for token, label in run)
    return [decode(words, [label for _, label in run]) for run in runs]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("image", [True, False])
def test_labels_are_the_assistants_words_and_end_tokens(name: str, image: bool, trim_offsets: bool) -> None:
    subject = processor(TEMPLATES[name], trim_offsets)
    row = subject.encode(CONVERSATION, image=image)
    space = " " if name == "instruct" else ""
    assert [run.removeprefix(space) for run in labelled_runs(row, subject.tokenizer)] == [answer + END for answer in ANSWERS]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [True, False])
def test_the_row_is_the_rendered_template_with_the_placeholders_in_place(name: str, system: bool) -> None:
    subject = processor(TEMPLATES[name])
    messages: list[Message] = [{"role": "system", "content": "Answer in one word."}] if system else []
    messages += CONVERSATION
    words = subject.tokenizer
    rendered = words.apply_chat_template(messages, tokenize=False)
    before, after = rendered.split(CONVERSATION[0]["content"], 1)
    expected = [
        *words(before, add_special_tokens=False)["input_ids"],
        *[subject.image_token_id] * IMAGE_TOKENS,
        *words(CONVERSATION[0]["content"] + after, add_special_tokens=False)["input_ids"],
    ]
    row = subject.encode(messages)
    assert row["input_ids"] == expected
    assert len(row["labels"]) == len(expected)
    assert not any(label == subject.image_token_id for label in row["labels"])
    prompt = subject.encode(messages[:-1], generate=True)["input_ids"]
    assert prompt == expected[: len(prompt)]  # what the model continues is what it was trained to continue
    assert decode(words, expected[len(prompt) :]).strip() == "Yes" + END


@pytest.mark.parametrize("name", ["chatml", "with_system"])
def test_truncation_drops_whole_turns_and_never_an_image_token(name: str) -> None:
    subject = processor(TEMPLATES[name])
    whole = [subject.encode(CONVERSATION[:stop]) for stop in (2, 4, 6)]
    lengths = [len(row["input_ids"]) for row in whole]
    first_answer = next(index for index, label in enumerate(whole[0]["labels"]) if label != IGNORED)
    for max_length in range(1, lengths[-1] + 3):
        if max_length <= first_answer:
            with pytest.raises(ValueError, match=rf"^{max_length} tokens do not hold what stands .* raise max_length$"):
                subject.encode(CONVERSATION, max_length=max_length)
            continue
        fitting = [row for row, length in zip(whole, lengths, strict=True) if length <= max_length]
        expected = fitting[-1] if fitting else {key: values[:max_length] for key, values in whole[0].items()}
        row = subject.encode(CONVERSATION, max_length=max_length)
        assert row == expected
        assert row["input_ids"].count(subject.image_token_id) == IMAGE_TOKENS


def test_generation_is_never_cut() -> None:
    subject = processor()
    assert subject.encode(CONVERSATION[:3], generate=True, max_length=5) == subject.encode(CONVERSATION[:3], generate=True)


def qwen2() -> Qwen2Tokenizer:
    """The tokenizer of stage 0."""
    words = Qwen2Tokenizer(eos_token=END, pad_token=END).train_new_from_iterator(TEXTS, 400, new_special_tokens=[END, "<|im_start|>"])
    words.chat_template = CHATML
    return words


def llama() -> LlamaTokenizer:
    """A tokenizer as Llama 2's: with a space before the text, and merges that turn the characters of "</s>" into the token."""
    letters = ["▁", *string.ascii_letters, *string.digits, *"<>/[]|_?.,\n:-", "</", "s>"]
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    return LlamaTokenizer(vocab=vocab, merges=[("<", "/"), ("s", ">"), ("</", "s>")], chat_template=INSTRUCT.replace(END, "</s>"))


@pytest.mark.parametrize(
    "made", [tokenizer, lambda: tokenizer(trim_offsets=True), qwen2, llama], ids=["plain", "trimmed", "qwen2", "llama"]
)
def test_messages_never_become_special_tokens(made: Callable[[], Any]) -> None:
    """Special ids come from the template alone; the message is encoded, and learned, as the characters that it holds."""
    words = made()
    subject = Med3DVLMProcessor(VolumeProcessor(size=SIZE), words, IMAGE_TOKENS)
    texts = [*words.all_special_tokens, "<image>"]
    plain = turn("Is there an effusion?", "No")
    special = set(words.convert_tokens_to_ids(texts))
    expected = [token for token in subject.encode(plain)["input_ids"] if token in special]
    for text in (*texts, "<<image>>", "<image><image>", f"<s></s>{MARK.join(texts)}", " ".join(texts) + "\n" + "".join(texts)):
        messages = turn(f"{text} there {text}an effusion{text}?", f"No{text} {text}")
        row = subject.encode(messages)
        assert [token for token in row["input_ids"] if token in special] == expected, text
        said = decode(words, [token for token in row["input_ids"] if token != subject.image_token_id])
        for message in messages:
            assert message["content"].replace(MARK, "\ufffd") in said
        (answer,) = labelled_runs(row, words)
        assert answer.strip().startswith(f"No{text} {text}".replace(MARK, "\ufffd").strip())
        prompt = subject.encode(messages[:1], generate=True)["input_ids"]
        assert prompt == row["input_ids"][: len(prompt)]
        instead = subject.branch([plain], context=f"Mass{text} of 3 mm.")
        without = subject.branch([plain], context="")
        assert [token for token in instead["input_ids"] if token in special] == [
            token for token in without["input_ids"] if token in special
        ]


UNIGRAM = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    *((letter, -3.0) for letter in string.ascii_letters + string.digits + "<>/[]|_?.,"),
]


@pytest.mark.parametrize(
    "made",
    [
        tokenizer,
        qwen2,
        llama,
        lambda: BertTokenizer(common_words([*TEXTS, string.ascii_letters, "[]"], 300)),
        lambda: T5Tokenizer(vocab=UNIGRAM),
        ByT5Tokenizer,
    ],
    ids=["plain", "qwen2", "llama", "bert", "t5", "byt5"],
)
def test_reports_never_become_special_tokens(made: Callable[[], Any]) -> None:
    words = made()
    words.pad_token = words.pad_token or words.eos_token
    pairs = Med3DCLIPProcessor(VolumeProcessor(size=SIZE), words, 200)
    special = {token for token in words.all_special_ids if token != words.unk_token_id}
    (plain,) = pairs(text="No mass.")["input_ids"].tolist()
    for text in words.all_special_tokens:
        (row,) = pairs(text=[f"No {text}mass{text}."])["input_ids"].tolist()
        assert [token for token in row if token in special] == [token for token in plain if token in special], text
        assert re.sub(r"\W", "", text).lower() in re.sub(r"\W", "", words.decode(row, skip_special_tokens=True)).lower()


def test_a_volume_needs_a_user_message() -> None:
    with pytest.raises(ValueError, match="needs a user message"):
        processor().encode([{"role": "assistant", "content": "Liver"}])


def test_a_tokenizer_without_a_template_is_refused() -> None:
    words = tokenizer()
    words.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Med3DVLMProcessor(VolumeProcessor(size=SIZE), words)
    assert Med3DVLMProcessor(VolumeProcessor(size=SIZE), words, chat_template=CHATML).chat_template == CHATML


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    strips = "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        processor(strips).encode(CONVERSATION)


def test_a_batch_to_generate_from_is_padded_on_the_left() -> None:
    subject = processor()
    conversations = [turn("Which organ has a lesion?", "")[:1], [*turn("Where?", "Left"), {"role": "user", "content": "Sure?"}]]
    volumes = [
        Volume(np.random.default_rng(seed).normal(0, 20, (10, 20, 30)).astype(np.float32), (3.0, 1.0, 1.0), "SPL") for seed in (0, 1)
    ]
    batch = subject(conversations, volumes)
    rows = [subject.encode(messages, generate=True)["input_ids"] for messages in conversations]
    length = max(map(len, rows))
    assert batch["pixel_values"].shape == (2, 1, *SIZE)
    assert "labels" not in batch
    for ids, mask, row in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), rows, strict=True):
        assert ids == [subject.pad_token_id] * (length - len(row)) + row
        assert mask == [0] * (length - len(row)) + [1] * len(row)
        assert ids.count(subject.image_token_id) == IMAGE_TOKENS


def test_a_batch_to_train_on_is_padded_on_the_right() -> None:
    subject = processor()
    conversations = [turn("Which organ has a lesion?", "Liver"), turn("Where?", "Left")]
    batch = subject(conversations, generate=False)
    rows = [subject.encode(messages, image=False) for messages in conversations]
    assert "pixel_values" not in batch
    for number, row in enumerate(rows):
        used = len(row["input_ids"])
        assert batch["input_ids"][number].tolist()[:used] == row["input_ids"]
        assert batch["labels"][number].tolist() == row["labels"] + [IGNORED] * (batch["labels"].shape[1] - used)
        assert batch["attention_mask"][number].sum() == used


def test_save_and_load(tmp_path: Path) -> None:
    subject = processor(TEMPLATES["with_system"])
    subject.save_pretrained(tmp_path)
    loaded = Med3DVLMProcessor.from_pretrained(tmp_path)
    assert loaded.encode(CONVERSATION) == subject.encode(CONVERSATION)
    assert loaded.branch([CONVERSATION[:2], CONVERSATION]) == subject.branch([CONVERSATION[:2], CONVERSATION])
    assert (loaded.num_image_tokens, loaded.image_token_id) == (IMAGE_TOKENS, subject.image_token_id)
    assert loaded.image_processor.to_dict() == subject.image_processor.to_dict()


def test_the_tokenizers_own_special_tokens_stay_special() -> None:
    subject = processor()
    assert subject.tokenizer.decode(subject.encode(turn("Where?", "Left"))["input_ids"], skip_special_tokens=True).split() == [
        "user", "Where?", "assistant", "Left",
    ]  # fmt: skip


BRANCHES = [turn("Which organ has a lesion?", "Liver"), [*turn("Where?", "Left, 12 mm"), *turn("Sure?", "Yes")], turn("An effusion?", "No")]


@pytest.fixture(scope="module")
def tiny() -> tuple[Med3DVLM, Med3DVLMProcessor]:
    subject = processor(TEMPLATES["with_system"])
    text_model = language_model()
    options = {"widths": [4, 4, 8, 8, 16], "layer_scale": 0.5}
    config = Med3DVLMConfig("dcformer_nano", options, SIZE, text_config=text_model.config, image_token_id=subject.image_token_id)
    subject.num_image_tokens = config.num_image_tokens
    return Med3DVLM(config, language_model=text_model).eval(), subject


def test_branches_share_the_part_up_to_the_image_and_continue_from_there(tiny: tuple[Med3DVLM, Med3DVLMProcessor]) -> None:
    _, subject = tiny
    row = subject.branch(BRANCHES)
    alone = [subject.encode(messages) for messages in BRANCHES]
    shared = alone[0]["input_ids"].index(subject.image_token_id) + subject.num_image_tokens
    assert row["branches"][:shared] == [0] * shared
    assert row["input_ids"][:shared] == alone[0]["input_ids"][:shared]
    assert row["input_ids"].count(subject.image_token_id) == subject.num_image_tokens
    for number, single in enumerate(alone, start=1):
        places = [index for index, branch in enumerate(row["branches"]) if branch == number]
        assert [row["input_ids"][place] for place in places] == single["input_ids"][shared:]
        assert [row["labels"][place] for place in places] == single["labels"][shared:]
        assert [row["position_ids"][place] for place in places] == list(range(shared, len(single["input_ids"])))
    assert row["position_ids"][:shared] == list(range(shared))


def test_branch_mask_equals_a_double_loop() -> None:
    branches = torch.tensor([[0, 0, 1, 1, 2, 2, 2, -1], [0, 1, 2, 3, 3, -1, -1, -1]])
    mask = branch_mask(branches)
    assert mask.shape == (2, 1, 8, 8) and mask.dtype == torch.bool
    for row, query, key in np.ndindex(2, 8, 8):
        own, other = branches[row, query], branches[row, key]
        assert mask[row, 0, query, key] == (key <= query and (other == 0 or other == own))
    assert mask.any(dim=-1).all()


def branched_batch(subject: Med3DVLMProcessor, rows: list[dict[str, list[int]]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    batch = subject.pad(rows, left=False)
    return batch, batch["branches"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("context", [None, "The liver holds a round mass of 12 mm."])
def test_every_branch_has_the_logits_of_its_conversation_alone(
    tiny: tuple[Med3DVLM, Med3DVLMProcessor], context: str | None, attention: str
) -> None:
    model, subject = tiny
    model.language_model.set_attn_implementation(attention)
    pixels = torch.rand(2, 1, *SIZE)
    image = {} if context is not None else {"pixel_values": pixels}
    sets = [BRANCHES, BRANCHES[1:]]  # the second row is shorter and padded
    batch, branches = branched_batch(subject, [subject.branch(conversations, context=context) for conversations in sets])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, **image).logits
        loss = model(**batch, **image, labels=labels).loss
    losses = []
    for number, conversations in enumerate(sets):
        shared = int((branches[number] == 0).sum())
        for branch, messages in enumerate(conversations, start=1):
            alone = subject.encode(messages, image=context is None)
            if context is not None:
                prefix = subject.tokenizer(context, add_special_tokens=False)["input_ids"]
                begins = shared - len(prefix)  # the context stands where the image would
                alone = {
                    key: alone[key][:begins] + list(filler) + alone[key][begins:]
                    for key, filler in (("input_ids", prefix), ("labels", [IGNORED] * len(prefix)))
                }
            ids = torch.tensor([alone["input_ids"]])
            picture = {} if context is not None else {"pixel_values": pixels[number : number + 1]}
            with torch.no_grad():
                expected = model(ids, torch.ones_like(ids), **picture).logits[0]
            assert torch.allclose(logits[number, branches[number] == branch], expected[shared:], atol=TOLERANCE)
            wanted = torch.tensor(alone["labels"][1:])
            losses.append(torch.nn.functional.cross_entropy(expected[:-1], wanted, reduction="none")[wanted != IGNORED])
    if context is None:
        assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    model.language_model.set_attn_implementation("sdpa")


def test_a_context_is_labelled_once(tiny: tuple[Med3DVLM, Med3DVLMProcessor]) -> None:
    _, subject = tiny
    context = "The liver holds a round mass of 12 mm."
    row = subject.branch(BRANCHES, context=context)
    shared = row["branches"].count(0)
    assert row["labels"][:shared] == row["input_ids"][:shared]
    assert decode(subject.tokenizer, row["input_ids"][:shared]).endswith("user\n" + context)
    assert subject.image_token_id not in row["input_ids"]
    assert row["labels"][shared:] == subject.branch(BRANCHES)["labels"][subject.branch(BRANCHES)["branches"].count(0) :]


def test_each_branch_is_truncated(tiny: tuple[Med3DVLM, Med3DVLMProcessor]) -> None:
    _, subject = tiny
    longest = len(subject.encode(BRANCHES[0])["input_ids"])
    row = subject.branch(BRANCHES, max_length=longest)
    shared = row["branches"].count(0)
    for number, messages in enumerate(BRANCHES, start=1):
        expected = subject.encode(messages, max_length=longest)["input_ids"][shared:]
        assert [token for token, branch in zip(row["input_ids"], row["branches"], strict=True) if branch == number] == expected


def test_branches_with_different_beginnings_are_refused(tiny: tuple[Med3DVLM, Med3DVLMProcessor]) -> None:
    _, subject = tiny
    other = [{"role": "system", "content": "Answer in one word."}, *turn("Where?", "Left")]
    with pytest.raises(ValueError, match="must begin alike up to the image"):
        subject.branch([BRANCHES[0], other])
