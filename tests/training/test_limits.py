"""Limits of training settings: the table covers all of ours, names existing ones, and its intervals are enforced."""

import dataclasses
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from transformers import TrainingArguments

from med3dvlm.training import ct_clip, stage0_language_model, stage2_projector, stage3_lora
from med3dvlm.training.contrastive import ContrastiveArguments
from med3dvlm.training.limits import CHOICES, INTERVALS, REASONS, REFUSED, UNSET, check_settings

KINDS = (
    stage0_language_model.Stage0Arguments, ContrastiveArguments, ct_clip.CTCLIPArguments, stage2_projector.Stage2Arguments,
    stage3_lora.Stage3Arguments,
)  # fmt: skip
NEUTRAL = {name: allowed for name, (allowed, _) in REFUSED.items()} | {name: known[0] for name, known, _ in CHOICES}


def test_rows_are_grouped_by_length_only_where_it_is_known(tmp_path: Path) -> None:
    for kind in KINDS:
        known = kind in (stage0_language_model.Stage0Arguments, stage2_projector.Stage2Arguments, stage3_lora.Stage3Arguments)
        with nullcontext() if known else pytest.raises(ValueError, match="this stage does not know how long its rows are"):
            kind(str(tmp_path), use_cpu=True, report_to="none", train_sampling_strategy="group_by_length")


def test_the_table_covers_all_numeric_settings() -> None:
    known: set[str] = set()
    for kind in KINDS:
        hints = get_type_hints(kind)
        known |= set(hints)
        ours = set(hints) - {field.name for field in dataclasses.fields(TrainingArguments)}
        numbers = {name for name in ours if {int, float} & {hints[name], *get_args(hints[name])}}
        assert numbers <= set(INTERVALS), kind
    assert set(INTERVALS) | set(NEUTRAL) | set(REASONS) | set(UNSET) <= known


@pytest.mark.parametrize(
    ("name", "allowed", "refused", "sentence"),
    [
        ("lora_dropout", [0, 0.5, 0.999], [-0.1, 1, 2, math.nan, math.inf], "must be at least 0 and less than 1"),
        ("adam_epsilon", [1e-12, 1], [0, -1e-8, math.nan, math.inf], "must be more than 0"),
        ("lora_rank", [1, 65536], [0, -1, 65537], "must be at least 1 and at most 65536"),
        ("logit_bias", [-1e9, 0, None], [math.inf, -math.inf, math.nan], "must be a finite number"),
        ("max_steps", [-1, 1, 10**9], [0, -2], "must be at least 1"),
        ("save_total_limit", [None, 2], [1, 0, -1], "must be at least 2: while a checkpoint is being written"),
        (
            "optim",
            ["adamw_torch", "sgd"],
            ["adafactor", "lion_8bit"],
            "adamw_torch_fused or paged_adamw_32bit or rmsprop or sgd",
        ),
        ("save_only_model", [False], [True], "must be false: a training could not continue"),
    ],
)
def test_values_inside_and_outside(name: str, allowed: list[Any], refused: list[Any], sentence: str) -> None:
    for value in allowed:
        check_settings(NEUTRAL | {name: value})
    for value in refused:
        with pytest.raises(ValueError, match=f"^{name} is .*{sentence}"):
            check_settings(NEUTRAL | {name: value})
