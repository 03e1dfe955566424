"""Stage 0, for the built-in demo alone: train a small Qwen2 and its tokenizer on the words of the training texts.

    med3dvlm train stage0 --config demo/stage0_language_model
    med3dvlm train stage0 --config smoke/stage0_language_model --max-steps 4

It is plain language modelling on text: reports, and questions asked about a report where later the image will stand. No volume is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from med3dvlm import Med3DVLMProcessor
from med3dvlm.datasets.conversations import ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.models.vlm_processor import branch_mask
from med3dvlm.training.arguments import StageArguments
from med3dvlm.training.language import ConversationTrainer, limit_lengths
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.run import finish, run_training, save_final

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"]


@dataclass
class Stage0Arguments(StageArguments):
    knows_lengths = True
    vocabulary: int = field(default=1000, metadata={"help": "tokens of the tokenizer"})
    hidden_size: int = field(default=256, metadata={"help": "width of the language model"})
    layers: int = field(default=4, metadata={"help": "layers of the language model"})
    heads: int = field(default=4, metadata={"help": "attention heads; half as many for keys and values"})
    max_length: int = field(
        default=512, metadata={"help": "tokens of a report with a question about it, of which the report takes half at most"}
    )
    max_row_length: int = field(default=4096, metadata={"help": "tokens of a row; a study with more conversations takes several rows"})
    reports: float = field(default=0.3, metadata={"help": "share of rows with the report as an answer"})
    closed: float = field(default=0.25, metadata={"help": "share of rows with a question whose choices are spelled out"})
    follow_ups: float = field(default=0.15, metadata={"help": "share of rows with two questions in one conversation"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.key_heads or self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"heads is {self.heads} and hidden_size {self.hidden_size}, but heads must be 1, 3 or even, and hidden_size a multiple of twice "
                "the heads"
            )

    @property
    def key_heads(self) -> int:
        """Return the heads for keys and values."""
        return max(1, self.heads // 2)


class MaskCollator(ConversationCollator):
    """As ConversationCollator's, for a language model by itself, which knows masks but no branches."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        if "branches" in batch:
            batch["attention_mask"] = branch_mask(batch.pop("branches"))
        return batch


def train_tokenizer(dataset: ConversationDataset, vocabulary: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE on every text of the training split, with a chat template.

    It is a Qwen2Tokenizer from the start, since that is what AutoTokenizer makes of it beside a Qwen2 model: another way to split
    the text would give the later stages other tokens than this one learned.
    """
    texts = (message["content"] for row in range(len(dataset)) for turns in dataset.conversations(row) for message in turns)
    end = SPECIAL_TOKENS[0]
    untrained = Qwen2Tokenizer(unk_token=end, eos_token=end, pad_token=end)
    tokenizer = untrained.train_new_from_iterator(texts, vocabulary, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Stage0Arguments, argv)
    data = arguments.open_data()
    options = ConversationOptions(reports=arguments.reports, closed=arguments.closed, follow_ups=arguments.follow_ups)

    def dataset(split: str) -> ConversationDataset:
        return ConversationDataset(data, split, options, arguments.seed, image=False)

    texts = dataset("train")
    validation = dataset(arguments.validation_split) if arguments.validates else None
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_heads,
        max_position_embeddings=max(2048, arguments.max_length),
        tie_word_embeddings=True,
        initializer_range=arguments.hidden_size**-0.5,  # 0.02, the default, starts so narrow a model with nearly even attention
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    processor = Med3DVLMProcessor(data.processor, tokenizer, num_image_tokens=1)
    for split, rows in (("train", texts), (arguments.validation_split, validation)):
        if rows is not None:
            limit_lengths(rows, split, processor, arguments)
    trainer = ConversationTrainer(
        model, arguments, train_dataset=texts, eval_dataset=validation, processing_class=tokenizer,
        data_collator=MaskCollator(processor, arguments.max_length),
    )  # fmt: skip
    run_training(trainer, arguments, str(data.summary["fingerprint"]))
    save_final(trainer)
    finish()
