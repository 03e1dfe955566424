"""A tiny Med3DChat model that learned a few answers by heart."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from med3dvlm import Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, Volume, VolumeProcessor
from med3dvlm.prompts import REPORT_PROMPTS

SIZE = (32, 64, 64)


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


REPORTS = (
    "The liver holds a round mass of 30 mm.\nThe spleen is normal. No ascites.",
    "Both lungs are clear.\nA small pleural effusion is seen on the right, and the heart is large.",
)


QUESTIONS = {
    "Which organ has a lesion?": ("Liver", "None at all"),
    "Is there an effusion, and where?": ("No", "On the right side"),
    "Plane?": ("Axial", "Axial"),
}


FOLLOW_UP = "And how large is it, please?"


SIZES = {"Which organ has a lesion?": "30 mm", "Plane?": "A plane has no size"}


def volume(number: int) -> Volume:
    """Return one of two scans, with a bright block near the start or near the end."""
    array = np.random.default_rng(number).normal(0, 20, (10, 20, 30)).astype(np.float32)
    array[2:5, 4:9, 3:12] += 900 * (number == 0)
    array[6:9, 11:17, 17:28] += 900 * (number == 1)
    return Volume(array, (3.0, 1.0, 1.0), "SPL", source=f"volume {number}")


def conversations(number: int) -> list[list[dict[str, str]]]:
    def turn(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    turns = [turn(question, answers[number]) for question, answers in QUESTIONS.items()]
    follow_ups = [turn(question, QUESTIONS[question][number]) + turn(FOLLOW_UP, size) for question, size in SIZES.items()]
    return [*turns, turn(REPORT_PROMPTS[0], REPORTS[number]), *follow_ups]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 400 tokens; "<|end|>" ends a turn and is not the end of text, as in Phi and Llama 3."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bare.train_from_iterator([message["content"] for number in (0, 1) for row in conversations(number) for message in row], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<|pad|>", eos_token="<|eos|>", extra_special_tokens=special[2:], chat_template=TEMPLATE
    )


def train_tiny_model() -> tuple[Med3DVLM, Med3DVLMProcessor]:
    """Train a tiny model until it knows `conversations` by heart."""
    torch.manual_seed(0)
    words = tokenizer()
    text_config = Qwen2Config(
        vocab_size=len(words) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=160,
    )  # fmt: skip
    options = {"widths": [8, 8, 16, 16, 32], "layer_scale": 0.1}
    config = Med3DVLMConfig("dcformer_nano", options, SIZE, text_config=text_config, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=SIZE), words, config.num_image_tokens)
    assert processor.image_token_id == config.image_token_id
    model = Med3DVLM(config, language_model=Qwen2ForCausalLM(text_config)).eval()
    with torch.no_grad():
        encoded = [model.encode_image(processor.image_processor(volume(number))["pixel_values"]) for number in (0, 1)]
    rows = [(number, processor.encode(row)) for number in (0, 1) for row in conversations(number)]
    batch = processor.pad([row for _, row in rows], left=False)
    features = tuple(torch.cat([encoded[number][level] for number, _ in rows]) for level in (0, 1))
    optimizer = torch.optim.AdamW([*model.projector.parameters(), *model.language_model.parameters()], 5e-3, weight_decay=0)
    for _ in range(800):  # as many as it takes, which differs with the number of threads
        loss = model(**batch, image_features=features).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 5e-3:
            break
    return model.eval(), processor
