"""Allowed values of training settings: numbers by intervals ("(0, 1]" is more than 0 and at most 1), others by name; and refused settings."""

import math
from collections.abc import Mapping
from typing import Any

SHARE = "[0, 1]"
COUNT = "[1, inf)"
WIDTH = "[1, 65536]"
# Setting -> interval, of transformers' settings and of every stage's own. None, where a setting may be left out, is always allowed.
INTERVALS = {
    # all stages
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "data_seed": "[0, 4294967295]",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": COUNT,
    "eval_delay": "[0, inf)",
    "eval_steps": "(0, inf)",
    "gradient_accumulation_steps": COUNT,
    "learning_rate": "[0, 100]",
    "logging_steps": "(0, inf)",
    "max_grad_norm": "[0, inf)",
    "max_steps": COUNT,
    "num_train_epochs": "(0, inf)",
    "per_device_eval_batch_size": COUNT,
    "per_device_train_batch_size": COUNT,
    "save_steps": "(0, inf)",
    "save_total_limit": "[2, inf)",
    "seed": "[0, 4294967295]",
    "warmup_steps": "[0, inf)",
    "weight_decay": "[0, inf)",
    # stage 0
    "vocabulary": "[261, 1000000]",
    "hidden_size": WIDTH,
    "layers": "[1, 1024]",
    "heads": "[1, 1024]",
    # stage 1 and the CT-CLIP path
    "chunk_size": COUNT,
    "image_stages": COUNT,
    "image_levels": "[-64, -1]",  # of stage 2
    "logit_bias": "(-inf, inf)",
    "logit_scale": "[-10, 4.6052]",
    "max_text_length": "[3, inf)",
    "projection_dim": WIDTH,
    "sentences": COUNT,
    # segmentation, and stage 1 with a dense loss
    "attention_heads": COUNT,
    "attention_level": "[0, inf)",
    "dense_studies": COUNT,
    "dense_weight": "[0, inf)",
    "embedding_dim": WIDTH,
    "embedding_stride": COUNT,
    "presence_weight": "[0, inf)",
    "prompt_places": SHARE,
    "prompt_sentences": SHARE,
    "prompt_sides": SHARE,
    "prompt_structures": "[0, inf)",
    "prompts": COUNT,
    "token_levels": "[-64, -1]",
    "token_weight": "[0, inf)",
    # stages 0, 2 and 3
    "closed": SHARE,
    "follow_ups": SHARE,
    "max_length": COUNT,
    "max_row_length": COUNT,
    "reports": SHARE,
    # stages 2 and 3
    "projector_depth": "[1, 64]",
    "lora_alpha": COUNT,
    "lora_dropout": "[0, 1)",
    "lora_rank": WIDTH,
    "mask_weight": "[0, inf)",
}
UNSET = {"max_steps": -1}  # transformers' sign of a setting that is left out, where that is not None
REASONS = {
    "logit_scale": "it is the logarithm of the temperature, which is bounded by 100",
    "max_text_length": "the beginning and the end of a text take a token each",
    "sentences": "leave it out to take whole reports",
    "save_total_limit": "while a checkpoint is being written, the whole one before it has to stay",
    "vocabulary": "it holds 256 bytes and five special tokens",
}
# Settings of transformers that are refused: the only value that is allowed, and why.
REFUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the models compute their losses themselves, and transformers would smooth over positions that are not shifted"),
    "neftune_noise_alpha": (None, "the noise would reach the words but not the image between them"),
    "fp16": (False, "the models compute in float32 or bfloat16; pass --bf16 true"),
    "fp16_full_eval": (False, "the models compute in float32 or bfloat16"),
    "bf16_full_eval": (False, "it would round the float32 weights that train; with --bf16 true the validation loss is computed in bfloat16 already"),
    "auto_find_batch_size": (False, "the batch size is a part of what is learned; choose a smaller per_device_train_batch_size"),
    "average_tokens_across_devices": (True, "else the gradients would be divided by the number of processes"),
    "use_liger_kernel": (False, "its kernels replace a language model's loss, which is not used here"),
    "fsdp": (None, "weights are shared out by DeepSpeed; pass --deepspeed deepspeed/zero3"),
    "accelerator_config": (None, "it may change what a batch is"),
    "remove_unused_columns": (False, "the collators need every column of a row"),
    "save_only_model": (False, "a training could not continue from its checkpoints"),
    "ignore_data_skip": (False, "a training that was stopped would continue with the wrong rows"),
    "push_to_hub": (False, "checkpoints hold what was learned, not a model; upload the output folder when it is finished: hf upload"),
    "dataloader_persistent_workers": (False, "persistent workers do not learn that a new epoch begins"),
}  # fmt: skip
# Settings of transformers -> allowed values, and why.
CHOICES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("optim", ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "rmsprop", "sgd"), "another engine could not take over the state of others"),
    ("train_sampling_strategy", ("random", "sequential", "group_by_length"), "no other order can be continued"),
    ("metric_for_best_model", ("loss", "eval_loss"), "nothing else is measured while training"),
)  # fmt: skip


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a number lies outside of its interval, or a setting has a value that is not allowed."""
    for name, interval in INTERVALS.items():
        value = settings.get(name)
        numbers: list[float] = value if isinstance(value, list) else [value]  # type: ignore[list-item]
        if value not in (None, UNSET.get(name)) and not all(_contains(interval, number) for number in numbers):
            reason = f": {REASONS[name]}" if name in REASONS else ""
            raise ValueError(f"{name} is {value} but must be {_in_words(interval)}{reason}")
    for name, known, reason in CHOICES:
        if (value := settings[name]) is not None and value not in known:
            raise ValueError(f"{name} is {getattr(value, 'value', value)!r} but must be {' or '.join(known)}: {reason}")
    for name, (allowed, reason) in REFUSED.items():
        if (value := settings[name]) not in (allowed, None, ""):
            raise ValueError(f"{name} is {value!r} but must be {str(allowed).lower()}: {reason}")


def _bounds(interval: str) -> tuple[float, float]:
    low, high = map(float, interval[1:-1].split(","))
    return low, high


def _contains(interval: str, value: float) -> bool:
    low, high = _bounds(interval)
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def _in_words(interval: str) -> str:
    low, high = _bounds(interval)
    words = []
    if math.isfinite(low):
        words.append(f"{'at least' if interval[0] == '[' else 'more than'} {low:g}")
    if math.isfinite(high):
        words.append(f"{'at most' if interval[-1] == ']' else 'less than'} {high:.10g}")
    return " and ".join(words) or "a finite number"
