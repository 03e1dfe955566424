"""Small parts that several tests build models from: a tokenizer, chat templates, language models of four families."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

END = "<|im_end|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Qwen2.5: a system message of its own where none is given, a newline after every end token.
WITH_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}" + CHATML
# As in Llama 2 and Mistral: the answer follows a space, and its end token stands at once behind it.
INSTRUCT = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] }}<|im_end|>"
    "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "with_system": WITH_SYSTEM, "instruct": INSTRUCT}
TEXTS = (
    "Which organ has a lesion? The liver holds a round mass of 12 mm in its right lobe.",
    "Is there a pleural effusion? No pleural effusion. Both lungs are clear.\nThe heart is not enlarged.",
    "You are a helpful assistant. Answer in one word. assistant user system",
)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi": {"partial_rotary_factor": 0.5},
}


def tokenizer(template: str = CHATML, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens. `trim_offsets` leaves a token's leading space out of its offsets, as Llama 3's and GPT-NeoX's do."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bare.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", END]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bare.train_from_iterator(TEXTS, trainer)
    if trim_offsets:
        bare.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<|pad|>", eos_token=END, extra_special_tokens=["<|im_start|>"], chat_template=template
    )


def language_model(family: str = "qwen2", vocab_size: int = 400, **settings: Any) -> PreTrainedModel:
    """Two layers, 32 wide unless said otherwise, with weights large enough for its answers to depend on what it reads."""
    config = AutoConfig.for_model(
        family, vocab_size=vocab_size, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, **{"hidden_size": 32, "intermediate_size": 48} | FAMILIES[family] | settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
