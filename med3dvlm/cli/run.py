"""`run`: a model at work on many scans."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from med3dvlm.cli.data import with_defaults
from med3dvlm.cli.options import MEANING, Commands, add_meaning, add_workers, check_workers, numbers, quiet_transformers, reading
from med3dvlm.inference.engines import add_engine, check_engine, start_engine
from med3dvlm.programs import add_flag, positive

FAILED, CUT = 1, 3  # exit codes


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("run", help="report on every scan of a folder, a list or a table, into tables")
    add = command.add_argument
    add("model", metavar="MODEL", type=Path, help="the folder of a trained model")
    add(
        "scans", metavar="SCANS", type=Path,
        help="a folder, with every scan below it; a list (.txt, a path a line); or a table (.csv, .tsv, .jsonl, .parquet) with the column "
        "image and, where you like, id, question, series, spacing, orientation, transpose, unit, hu, rescale",
    )  # fmt: skip
    add("--out", metavar="DIR", type=Path, required=True, help="the folder of the results; a run that was stopped continues")
    add("--question", metavar="TEXT", action="append", default=[], help="ask this about every scan, too; may be given several times")
    add_flag(command, "report", True, "write a report of every scan")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="maximum length of an answer in tokens (default: %(default)s)")
    add(
        "--series", choices=("thin-axial", "all"), default="thin-axial",
        help="which series of a DICOM study: the axial one of the thinnest slices that covers at least half of what the largest covers, or "
        "all, each as a case of its own (default: %(default)s)",
    )  # fmt: skip
    add("--contrastive", metavar="FOLDER", type=Path, help="a contrastive model (stage 1), for probabilities of findings")
    add("--masks", action="store_true", help="draw what the answers point to, or, with --segmenter, the findings that a report states")
    add("--segmenter", metavar="FOLDER", type=Path, help="a segmenter (`med3dvlm train segmentation`) that draws")
    add("--embed", action="store_true", help="write embeddings.parquet: of the contrastive model, else the encoder's mean features")
    add_engine(add)
    add_workers(command)
    add(
        "--workers-on", choices=("local", "ray"), default="local",
        help="where scans are read and prepared: in --workers processes here, or by the Ray cluster of RAY_ADDRESS or of this machine, one core "
        "a scan (default: %(default)s)",
    )  # fmt: skip
    add("--batch-size", type=positive, default=16, metavar="N", help="scans in a batch: speed and memory (default: %(default)s)")
    stated = command.add_argument_group("for scans of which the table does not state it")
    stated.add_argument("--spacing", type=numbers("Z,Y,X"), metavar="Z,Y,X", help="mm between slices, rows and columns")
    stated.add_argument("--straighten", action="store_true", help="resample tilted or unevenly spaced slices to a regular grid")
    add_meaning(stated)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Run the worklist. Returns the exit code: 1 where a scan has no result, else 3 where an answer was cut."""
    from med3dvlm.checkpoints import model_type
    from med3dvlm.worklist.running import Settings, run
    from med3dvlm.worklist.scans import scans_of

    check_workers(arguments)
    check_engine(arguments.engine, arguments.vllm_url, arguments.quantize)
    folders = {"med3dvlm": arguments.model, "med3d_clip": arguments.contrastive}
    for kind, folder in folders.items():
        if folder is not None and (found := model_type(folder)) != kind:
            raise ValueError(f"{folder} holds a model of type {found}, but one of type {kind} is needed there")
    scans, notes = scans_of(arguments.scans, arguments.out)
    for note in notes:
        print(note, file=sys.stderr)
    if not arguments.report and not arguments.question and not arguments.embed and not any(scan.questions for scan in scans):
        raise ValueError("nothing is asked: leave out --no-report, or give --question or --embed")
    if arguments.segmenter is not None and not (arguments.masks and arguments.report):
        raise ValueError("--segmenter draws the findings of reports; add --masks, and leave out --no-report")
    stated = reading(arguments, ("spacing", *MEANING))
    scans = [replace(scan, reading=with_defaults(stated, scan.reading)) for scan in scans]
    settings = Settings(
        arguments.report, tuple(arguments.question), arguments.max_new_tokens, arguments.series, arguments.masks, arguments.embed,
        arguments.straighten, stated,
    )  # fmt: skip
    counts = run(
        scans,
        arguments.out,
        settings,
        [folder for folder in folders.values() if folder],
        lambda: _models(arguments),
        arguments.workers,
        arguments.batch_size,
        arguments.workers_on,
    )
    print(
        f"{_number(counts.cases, 'case')} of {_number(len(scans), 'scan')} in {arguments.out}: results.jsonl, results.csv, cases/, manifest.json"
    )
    if counts.failures:
        print(f"Warning: {_number(counts.failures, 'scan')} without a result; {arguments.out / 'failures.jsonl'} says why", file=sys.stderr)
    if counts.cut:
        print(f"Warning: answers of {_number(counts.cut, 'case')} were cut at {arguments.max_new_tokens} tokens", file=sys.stderr)
    return FAILED if counts.failures else CUT if counts.cut else 0


def _number(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _models(arguments: argparse.Namespace) -> Any:
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.datasets.features import fingerprint
    from med3dvlm.inference.chat import Med3DChat
    from med3dvlm.search import Embedder
    from med3dvlm.worklist.running import Models

    keep_freed_memory()
    quiet_transformers()
    chat = Med3DChat.from_pretrained(arguments.model, segmenter=arguments.segmenter, quantize=arguments.quantize)
    if arguments.masks and chat.model.pointing is None and chat.segmenter is None:
        raise ValueError(f"{arguments.model} cannot point, so there are no masks; name a --segmenter, or leave out --masks")
    embedder = None if arguments.contrastive is None else Embedder(arguments.contrastive)
    for processor in (chat.processor.image_processor, *([chat.segmenter.processor.image_processor] if chat.segmenter else [])):
        processor.straighten |= arguments.straighten

    def about(folder: Path | None, model: Any) -> dict[str, str] | None:
        return None if folder is None else {"name": "/".join(folder.resolve().parts[-2:]), "fingerprint": fingerprint(model)}

    known = {
        "vlm": about(arguments.model, chat.model),
        "contrastive": about(arguments.contrastive, embedder and embedder.model),
        "segmenter": about(arguments.segmenter, chat.segmenter and chat.segmenter.model),
        "quantized": arguments.quantize,
    }
    engine = start_engine(chat, arguments.engine, arguments.vllm_url, arguments.batch_size)
    return Models(chat, engine, embedder, chat.segmenter, known)
