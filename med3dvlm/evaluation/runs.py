"""Shared by all evaluations: arguments, the data and settings of a run, and its record.

<output>/predictions.jsonl   one line a case, see `cases.py`
<output>/run.json            which model on which data with which settings and versions, and the seconds it took
<output>/scores.json, .md    from predictions and records alone, without timing: the same predictions give the same bytes
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.cases import ELSEWHERE, is_first, wait_for_all
from med3dvlm.files import differences, write_json, write_text
from med3dvlm.programs import Parser, add_flag, command_line, positive
from med3dvlm.records import Study
from med3dvlm.remote.cache import add_cache, cache_of
from med3dvlm.training.environment import environment


def evaluation_parser(documentation: str, batch_size: int = 16) -> Parser:
    """Return a parser with the arguments of every evaluation; its help begins with the script's own documentation."""
    parser = Parser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of the model; not needed with --score-only")
    parser.add_argument("--data", required=True, help="prepared data, see `med3dvlm prepare`: a folder, or an address as s3://bucket/data")
    add_cache(parser)
    parser.add_argument("--output", required=True, type=Path, help="folder of predictions and scores")
    parser.add_argument("--split", default="test", help="split of the data (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=batch_size, help="studies in a batch: speed, not results (default: %(default)s)"
    )
    parser.add_argument("--split-file", help="JSON of the studies of each split, as `med3dvlm audit` writes it (default: the data's own)")
    parser.add_argument("--limit", type=positive, help="take the first LIMIT studies only")
    add_flag(parser, "exclude_failures", False, "leave out unprepared studies")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--score-only", action="store_true", help="score the predictions that are there, without a model")
    return parser


def open_data(arguments: argparse.Namespace, **settings: Any) -> tuple[PreparedData, list[Study]]:
    """Open the prepared data and return it with the studies to evaluate.

    Args:
        settings: with which the predictions to score must have been made.

    Raises:
        ValueError: --model is missing, the split is unknown or smaller than --limit, or the predictions to score are about other data or were made
            with other settings.
    """
    if not arguments.model and not arguments.score_only:
        raise ValueError("--model is missing; name a model's directory, or score the predictions that are there with --score-only")
    keep_freed_memory()
    data = PreparedData(arguments.data, arguments.exclude_failures, arguments.split_file, cache_of(arguments))
    data.require_room(arguments.batch_size)
    studies = data.studies(arguments.split)
    if arguments.score_only:
        path = arguments.output / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}, the record of the predictions, is missing; run the same command without --score-only")
        _check_identity(path, _about(arguments, data) | settings)
    if arguments.limit and arguments.limit > len(studies):
        raise ValueError(f"--limit {arguments.limit} exceeds the {len(studies)} studies of split {arguments.split!r} in {arguments.data}")
    return data, studies[: arguments.limit]


def begin(arguments: argparse.Namespace, model: nn.Module, data: PreparedData, **settings: Any) -> None:
    """Make the output folder and write run.json, or make sure that the predictions in it came from the same model, data and settings.

    Raises:
        ValueError: they did not.
    """
    identity = {"model": fingerprint(model), **_about(arguments, data), "limit": arguments.limit, **settings}
    path = arguments.output / "run.json"
    if is_first() and not path.is_file():
        if left := sorted(place.name for pattern in ("predictions*", "embeddings*") for place in arguments.output.glob(pattern)):
            raise ValueError(f"{arguments.output} holds {left[0]} without the run.json that describes its run; {ELSEWHERE}")
        arguments.output.mkdir(parents=True, exist_ok=True)
        record = {
            "command": command_line(),
            "model": str(arguments.model),
            "data": str(arguments.data),
            "split_file": arguments.split_file,
            "identity": identity,
            "seconds": 0.0,
            **environment(),
        }
        write_json(path, record)
    wait_for_all()
    _check_identity(path, identity)


def training_split(data: PreparedData, evaluated: str) -> str | None:
    """Return the split that baselines learn from: the first whose name begins with "train"; None where that is evaluated, or there is none."""
    found = [split for split in sorted(data.summary["splits"]) if split.startswith("train")]
    return found[0] if found and found[0] != evaluated else None


def _about(arguments: argparse.Namespace, data: PreparedData) -> dict[str, Any]:
    return {"data": data.summary["fingerprint"], "split": arguments.split}


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    before = json.loads(path.read_text(encoding="utf-8-sig")).get("identity", {})
    if different := differences(before, identity):
        raise ValueError(f"{path.parent} holds predictions that were made with another {' and '.join(different)}; {ELSEWHERE}")


def write_scores(path: Path, scores: dict[str, Any], tables: str | None = None) -> None:
    """Write scores to 6 decimals, always the same bytes, and the tables, if any, as a Markdown file beside them."""
    write_json(path, _rounded(scores))
    if tables is not None:
        write_text(path.with_suffix(".md"), tables + "\n")


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return round(content, 6) if isinstance(content, float) else content


def other_patients(studies: Sequence[Study]) -> list[int] | None:
    """Return for each study the index of a study of another patient, each index once; None if all are of one patient.

    What a model says of that one's volume is what it says without having seen the study. Where one patient has more than half of the
    studies there are too few others: theirs are then taken in turn, as often as it needs, and of the one patient the first.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, study in enumerate(studies):
        members[study.patient].append(place)
    if len(members) < 2:
        return None
    most = max(members.values(), key=len)
    # Patient by patient in a ring, as many places on as the longest patient has: that leads out of every patient.
    ring = [place for group in members.values() for place in group]
    result = dict(zip(ring, ring[len(most) :] + ring[: len(most)], strict=True))
    others = [place for place in ring if place not in set(most)]
    if len(others) < len(most):
        result |= dict(zip(others, most, strict=False)) | dict(zip(most, cycle(others), strict=False))
    return [result[place] for place in range(len(studies))]
