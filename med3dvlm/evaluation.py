"""What the evaluation scripts share: arguments, predictions that survive being killed, stable scores, how likely a model finds an answer.

    <output>/predictions.jsonl   one line a case, written as it goes; started again, a run continues after the last whole line
    <output>/run.json            which model on which data with which settings and versions, and the seconds it took
    <output>/scores.json         from predictions and records alone, without timing: the same predictions give the same bytes

Shapes: B volumes, L tokens, n image tokens of C channels, V words of the vocabulary.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.familiarity import Features
from med3dvlm.files import read_lines, write_json
from med3dvlm.inference import Med3DChat
from med3dvlm.processing import IGNORED, Med3DVLMProcessor, Message, branch_mask
from med3dvlm.records import Study
from med3dvlm.training import environment
from med3dvlm.vlm import Med3DVLM

Case = TypeVar("Case")


def script(main: Callable[[], None]) -> None:
    """Run a script's main; what the user can mend ends it with one sentence and exit code 2."""
    keep_freed_memory()
    try:
        main()
    except (OSError, ValueError, SafetensorError) as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command continues here\n")
        sys.exit(130)


def evaluation_parser(documentation: str, batch_size: int = 16) -> argparse.ArgumentParser:
    """The arguments that every evaluation has; its help begins with the script's own documentation."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of the model; not needed with --score_only")
    parser.add_argument("--data", required=True, help="prepared data, see `med3dvlm prepare`")
    parser.add_argument("--output", required=True, type=Path, help="folder of predictions and scores")
    parser.add_argument("--split", default="test", help="split of the data (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=positive, default=batch_size, help="studies at a time: speed, not results (default: %(default)s)"
    )
    parser.add_argument("--limit", type=positive, help="take the first LIMIT studies only")
    parser.add_argument(
        "--exclude_failures", type=string_to_bool, nargs="?", const=True, default=False, help="leave out unprepared studies"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--score_only", action="store_true", help="score the predictions that are there, without a model")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def open_data(arguments: argparse.Namespace) -> tuple[PreparedData, list[Study]]:
    """The prepared data and the studies to evaluate.

    Raises:
        ValueError: --model is missing, the split is unknown or smaller than --limit, or the predictions to score are about other data.
    """
    if not arguments.model and not arguments.score_only:
        raise ValueError("--model is missing; name a model's directory, or score the predictions that are there with --score_only")
    data = PreparedData(arguments.data, arguments.exclude_failures)
    studies = data.studies(arguments.split)
    if arguments.score_only:
        path = arguments.output / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}, the record of the predictions, is missing; run the same command without --score_only")
        _check_identity(path, _about(arguments, data))
    if arguments.limit and arguments.limit > len(studies):
        raise ValueError(f"--limit {arguments.limit} exceeds the {len(studies)} studies of split {arguments.split!r} in {arguments.data}")
    return data, studies[: arguments.limit]


def begin(arguments: argparse.Namespace, model: PreTrainedModel, data: PreparedData, **settings: Any) -> None:
    """Make the output folder and write run.json, or make sure that the predictions in it came from the same model, data and settings.

    Raises:
        ValueError: they did not.
    """
    identity = {"model": fingerprint(model), **_about(arguments, data), "limit": arguments.limit, **settings}
    path = arguments.output / "run.json"
    if path.is_file():
        _check_identity(path, identity)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(sys.argv),
        "model": str(arguments.model),
        "data": str(arguments.data),
        "identity": identity,
        "seconds": 0.0,
        **environment(),
    }
    write_json(path, record)


def _about(arguments: argparse.Namespace, data: PreparedData) -> dict[str, Any]:
    return {"data": data.summary["fingerprint"], "split": arguments.split}


def _check_identity(path: Path, identity: dict[str, Any]) -> None:
    before = _read_json(path).get("identity", {})
    if different := [name for name, value in identity.items() if before.get(name) != value]:
        others = " and ".join(different)
        raise ValueError(f"{path.parent} holds predictions that were made with another {others}; delete it or choose another --output")


def predict(
    path: Path, batches: Sequence[Sequence[Case]], answer: Callable[[Sequence[Case]], list[dict[str, Any]]], identify: Callable[[Case], str]
) -> None:
    """Write one line a case to `path`, a batch at a time, after the lines that a run before left there.

    Args:
        batches: all cases in order. A batch of which some lines are there is computed again, so that a case is always
            computed beside the same others, and what a killed run continues has the same bytes.
        answer: a batch -> one record a case.
        identify: a case -> the value of "id" in its record.

    Raises:
        ValueError: the lines that are there belong to other cases.
    """
    there = read_lines(path, repair=True)
    _check_ids(path, there, [identify(case) for batch in batches for case in batch])
    started, done = time.perf_counter(), len(there)
    progress = tqdm(total=sum(map(len, batches)), initial=done, unit="case", desc=path.parent.name)
    with path.open("a", encoding="utf-8") as file, progress:
        first = 0
        for batch in batches:
            missing = range(max(done - first, 0), len(batch))
            first += len(batch)
            if not missing:
                continue
            for record in answer(batch)[missing.start :]:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            progress.update(len(missing))
    record = _read_json(path.parent / "run.json")
    write_json(path.parent / "run.json", record | {"seconds": round(record["seconds"] + time.perf_counter() - started, 1)})


def predictions(path: Path, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The records of all cases.

    Raises:
        FileNotFoundError, ValueError: there are none, not all, or those of other cases.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the same command without --score_only")
    records = read_lines(path)
    _check_ids(path, records, ids)
    if len(records) < len(ids):
        raise ValueError(f"{path} holds {len(records)} of {len(ids)} cases; run the same command without --score_only, it continues")
    return records


def in_batches(cases: Sequence[Case], size: int) -> list[Sequence[Case]]:
    """Consecutive runs of `size` cases; the last may be shorter."""
    return [cases[first : first + size] for first in range(0, len(cases), size)]


def _check_ids(path: Path, records: Sequence[dict[str, Any]], ids: Sequence[str]) -> None:
    found = [record.get("id") for record in records]
    for number, (one, other) in enumerate(zip(found, ids, strict=False), start=1):
        if one != other:
            raise ValueError(f"{path} line {number} is about {one}, but {other} is expected there; delete it or choose another --output")
    if len(found) > len(ids):
        raise ValueError(f"{path} holds {len(found)} cases, but {len(ids)} are asked for; delete it or choose another --output")


def write_scores(path: Path, scores: dict[str, Any]) -> None:
    """Write stable bytes: numbers to 6 decimals."""
    write_json(path, _rounded(scores))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return round(content, 6) if isinstance(content, float) else content


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns; floats have three decimals, None is a dash."""
    cells = [list(header)]
    cells += [["-" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def turn(question: str, answer: str) -> list[Message]:
    """A conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def load_chat(arguments: argparse.Namespace, data: PreparedData) -> Med3DChat:
    """The model as app and command line use it, if it takes volumes prepared as these are."""
    chat = Med3DChat.from_pretrained(arguments.model, arguments.device)
    same_preprocessing(chat.processor.image_processor, data)
    return chat


@torch.no_grad()
def answer_likelihoods(
    model: Med3DVLM, processor: Med3DVLMProcessor, conversations: Sequence[Sequence[Sequence[Message]]], features: Sequence[Features]
) -> list[list[float]]:
    """Mean log-probability of the assistant's words and turn end, for each of several conversations about each of B volumes.

    All conversations about a volume are one row, so that what stands before the question is computed once (see Med3DVLMProcessor.branch).
    The mean, not the sum: a long answer must not lose for its length.

    Args:
        conversations: for each volume one or more.
        features: for each volume what `Med3DVLM.encode_image` gives.
    """
    padded = processor.pad([processor.branch(row) for row in conversations], left=False)
    batch = {name: value.to(model.device) for name, value in padded.items()}
    low, high = (torch.cat(level) for level in zip(*features, strict=True))  # (B, n, C)
    branches, labels = batch["branches"], batch["labels"]  # (B, L)
    output = model(batch["input_ids"], branch_mask(branches), image_features=(low, high), labels=labels, position_ids=batch["position_ids"])
    labelled = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][labelled].unsqueeze(1)
    log_probabilities = output.logits.log_softmax(dim=-1).gather(1, targets).squeeze(1).double()  # (labelled, V) -> (labelled)
    places = (labelled.nonzero()[:, 0], branches[:, 1:][labelled] - 1)
    sums = log_probabilities.new_zeros(len(conversations), max(map(len, conversations)))
    counts = torch.zeros_like(sums)
    sums.index_put_(places, log_probabilities, accumulate=True)
    counts.index_put_(places, torch.ones_like(log_probabilities), accumulate=True)
    means = (sums / counts).tolist()
    return [values[: len(row)] for values, row in zip(means, conversations, strict=True)]
