"""The command line: `med3dvlm COMMAND --help` says what each takes.

Results go to stdout; warnings, progress and notices to stderr. The exit code is 0, or 2 with one sentence where the input
or the place of the output is at fault, or 130 after Ctrl+C. Files appear under their names when they are whole.
"""

import argparse
import errno
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from med3dvlm.inference import Answer, Med3DChat
    from med3dvlm.volume import Volume

REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the command again",
    errno.EDQUOT: "your share of the disk is full; free some space and run the command again",
    errno.EFBIG: "the file grows larger than is allowed here; write to another disk",
    errno.EACCES: "access is not permitted; choose another place or ask for the right",
    errno.EPERM: "access is not permitted; choose another place or ask for the right",
    errno.EROFS: "this disk can only be read; choose another place",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; check the path",
    errno.EEXIST: "a file of this name stands where a folder is needed; choose another name",
    errno.EISDIR: "this is a folder but a file is needed; check the path",
}
FAILURES_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        arguments.run(arguments)
    except (OSError, ValueError, SafetensorError, BrokenExecutor) as error:
        if arguments.traceback:
            raise
        print(f"med3dvlm: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("med3dvlm: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    from med3dvlm.report_labels import command as report_labels

    parser = argparse.ArgumentParser(prog="med3dvlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traceback", action="store_true", help="where something fails, show the place in the code")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="a scan's geometry, unit, intensities, what was assumed, and warnings")
    _add_scan(inspect)
    inspect.add_argument("--out", type=Path, metavar="PICTURE", help="draw a picture of it into this .png file")
    inspect.set_defaults(run=_inspect)

    phantom = commands.add_parser("phantom", help="write a data set of CT phantoms with reports, questions and labels")
    phantom.add_argument("out", metavar="OUT", type=Path, help="the folder, in the layout of M3D-Cap and M3D-VQA")
    phantom.add_argument("--studies", type=int, default=800, help="number of series (default: %(default)s)")
    phantom.add_argument("--seed", type=int, default=0, help="the same seed gives the same data (default: %(default)s)")
    phantom.add_argument("--detail", type=float, default=1.0, help="voxels along an axis, relative to the standard (default: %(default)s)")
    _add_workers(phantom)
    phantom.set_defaults(run=_phantom)

    prepare = commands.add_parser("prepare", help="run every volume of a data set through the preprocessing, once")
    prepare.add_argument("dataset", metavar="DATASET", help="layout of SRC: m3d, ct_rate, or table (a CSV or JSONL of your own)")
    prepare.add_argument("source", metavar="SRC", type=Path, help="the folder of the data set")
    prepare.add_argument("destination", metavar="DST", type=Path, help="the prepared data; an interrupted preparation continues")
    prepare.add_argument("--recipe", default="m3d", help="name of the preprocessing (default: %(default)s)")
    prepare.add_argument("--size", type=_size, metavar="D,H,W", help="voxels of the result (default: the recipe's; 128,256,256 for m3d)")
    prepare.add_argument("--shard", type=_shard, metavar="I/N", help="the I-th of N parts; once all are done, run without this to finish")
    prepare.add_argument("--verify", action="store_true", help="read all volumes that are there and make the damaged ones anew")
    _add_workers(prepare)
    prepare.set_defaults(run=_prepare)

    audit = commands.add_parser(
        "audit", help="look in prepared data for duplicates, leaks between splits and questions that tell their answer"
    )
    audit.add_argument("data", metavar="DST", type=Path, help="the prepared data; an interrupted audit continues")
    audit.add_argument("--out", type=Path, metavar="DIR", help="folder of audit.md, audit.json, deduplicated.json (default: DST/audit)")
    audit.add_argument(
        "--reports", action="store_true", help="leave out of deduplicated.json what only has its report in an earlier split, too"
    )
    _add_workers(audit)
    audit.set_defaults(run=_audit)

    findings = commands.add_parser("findings", help="read findings in reports: train a reader on labelled reports, or score one")
    report_labels.add_arguments(findings)
    findings.set_defaults(run=_findings)

    for name, help_text in (("ask", "ask a model about a scan"), ("report", "let a model write the report of a scan")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("model", metavar="MODEL", type=Path, help="the folder of a trained model")
        _add_scan(command)
        if name == "ask":
            command.add_argument("question", metavar="QUESTION")
        command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="length at most (default: %(default)s)")
        command.set_defaults(run=_ask, question=None) if name == "report" else command.set_defaults(run=_ask)

    merge = commands.add_parser("merge", help="merge a LoRA adapter into its base model")
    merge.add_argument("adapter", metavar="ADAPTER", type=Path, help="the folder that stages/stage3_lora.py wrote")
    merge.add_argument("out", metavar="OUT", type=Path, help="the folder of the whole model, which must not exist yet")
    merge.set_defaults(run=_merge)

    convert = commands.add_parser("convert", help="convert released weights to a folder that the other commands take")
    convert.add_argument("source", metavar="SRC", help="a folder, a file, or the id of a model on the hub")
    convert.add_argument("out", metavar="DST", type=Path, help="the folder of the converted model, which must not exist yet")
    convert.add_argument("--base", metavar="MODEL", help="folder or hub id: the other weights, settings and tokenizer (LoRA files)")
    convert.add_argument("--text-encoder", metavar="MODEL", help="folder or hub id: settings and tokenizer of a CLIP's text encoder")
    convert.add_argument("--size", type=_size, metavar="D,H,W", help="voxels of the volumes (default: those of the released model)")
    convert.add_argument("--lora-alpha", type=float, metavar="N", help="scale of LoRA times its rank (default: the file's, or 32)")
    convert.add_argument("--verify", action="store_true", help="read the result back and compare it with the source, bit for bit")
    convert.set_defaults(run=_convert)

    encoders = commands.add_parser("encoders", help="the vision encoders: parameters and operations, counted, beside the paper's")
    encoders.add_argument("names", metavar="NAME", nargs="*", help="these only")
    encoders.add_argument("--size", type=_size, metavar="D,H,W", help="voxels of a volume (default: 256,512,512 or the encoder's own)")
    encoders.add_argument("--measure", action="store_true", help="time and memory here too, one encoder after the other")
    encoders.set_defaults(run=_encoders)
    return parser


def _add_scan(parser: argparse.ArgumentParser) -> None:
    """A scan and what `read_volume` may be told about it."""
    from med3dvlm.volume import HU_POLICIES, UNITS

    add = parser.add_argument
    add("scan", metavar="SCAN", help="a scan file, a zip, or a folder with a DICOM series or numbered PNG or JPEG slices")
    add("--spacing", type=_numbers("Z,Y,X"), metavar="Z,Y,X", help="mm between slices, rows and columns (default: the file's)")
    add("--unit", choices=UNITS, help="of the values (default: by the header and the values)")
    add("--hu", choices=HU_POLICIES, default="auto", help="whose slope and intercept make the values HU (default: %(default)s)")
    add("--rescale", type=_numbers("S,I"), metavar="S,I", help="slope and intercept from a table beside the file, as in 1,-1024")
    add("--series", type=int, metavar="N", help="number of a DICOM series in the list that inspect shows (default: the largest)")


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `read_volume` that `_add_scan` took."""
    return {name: getattr(arguments, name) for name in ("spacing", "unit", "hu", "rescale", "series")}


def _numbers(form: str) -> Callable[[str], tuple[float, ...]]:
    """For argparse: as many numbers as `form` has letters, with commas between them."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(number) for number in text.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != len(form.split(",")):
            raise argparse.ArgumentTypeError(f"{text!r} must be numbers {form} with commas between them")
        return numbers

    return parse


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)")


def _size(text: str) -> tuple[int, ...]:
    try:
        depth, height, width = (int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be three whole numbers D,H,W, as in 128,256,256") from None
    return depth, height, width


def _shard(text: str) -> tuple[int, int]:
    try:
        part, parts = (int(number) for number in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N, as in 1/8 to 8/8") from None
    return part, parts


def _inspect(arguments: argparse.Namespace) -> None:
    import numpy as np

    from med3dvlm.plots import montage
    from med3dvlm.volume import read_volume

    if arguments.out and arguments.out.suffix.lower() != ".png":
        raise ValueError(f"{arguments.out}: the picture is written as PNG; give it a name that ends in .png")
    volume = read_volume(arguments.scan, **_reading(arguments))
    for label, value in _facts(volume, [float(value) for value in np.percentile(volume.array, (0, 1, 50, 99, 100))]):
        print(f"{label:<12} {value}")
    if arguments.out:
        _writable(arguments.out.parent)
        montage(volume.array, volume.spacing, arguments.out, orientation=volume.orientation)
        print(f"{'Picture':<12} {arguments.out}")


def _facts(volume: "Volume", percentiles: Sequence[float]) -> Iterator[tuple[str, str]]:
    """What `inspect` prints: pairs of a label and a value."""
    yield "Scan", Path(os.path.abspath(volume.source)).name
    yield "Size", " x ".join(map(str, volume.shape)) + " voxels (slices x rows x columns)"
    if volume.spacing is None:
        yield "Spacing", "unknown"
    else:
        extent = " x ".join(f"{number * mm:.0f}" for number, mm in zip(volume.shape, volume.spacing, strict=True))
        yield "Spacing", " x ".join(f"{mm:.4g}" for mm in volume.spacing) + f" mm, covering {extent} mm"
    if volume.orientation is None:
        yield "Orientation", "unknown"
    else:
        tilt = f", tilted by {volume.oblique:.0f} degrees" if (volume.oblique or 0) >= 1 else ""
        yield "Orientation", f"{volume.orientation} (where slices, rows and columns go), {volume.plane} slices{tilt}"
    yield "Unit", {"HU": "HU (Hounsfield units)", "unit": "within 0..1"}.get(volume.unit, volume.unit)
    low, first, median, last, high = percentiles
    yield "Values", f"{low:g} to {high:g}; 1 % below {first:g}, half below {median:g}, 99 % below {last:g}"
    for note in volume.notes:
        yield "Note", note
    for warning in volume.warnings:
        yield "Warning", warning


def _phantom(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets import m3d
    from med3dvlm.datasets.audit import text_only_baselines
    from med3dvlm.datasets.phantom import write_phantoms

    _workers(arguments)
    _writable(arguments.out)
    studies = write_phantoms(arguments.out, arguments.studies, arguments.seed, arguments.detail, arguments.workers)
    counts = ", ".join(f"{sum(study.split == split for study in studies)} {split}" for split in m3d.SPLITS)
    print(f"{len(studies)} studies of {len({study.patient for study in studies})} patients in {arguments.out}: {counts}")
    baselines = text_only_baselines(m3d.read(arguments.out, "train")[1], m3d.read(arguments.out, "test")[1])
    print("Accuracy on the test questions without looking at the scan (the choice that was right most often in training):")
    for kind, accuracy in baselines.items():
        print(f"  {kind:<12} {accuracy:.3f}")


def _prepare(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets import DATASETS
    from med3dvlm.datasets.preparation import parts_of_splits, prepare
    from med3dvlm.files import read_lines, write_json
    from med3dvlm.preprocessing import VolumeProcessor

    _workers(arguments)
    if arguments.dataset not in DATASETS:
        raise ValueError(f"data set {arguments.dataset!r} is unknown; known: {', '.join(DATASETS)}")
    dataset, source, destination = DATASETS[arguments.dataset], arguments.source, arguments.destination
    processor = VolumeProcessor(arguments.recipe, size=arguments.size)
    missed: dict[str, list[dict[str, str]]] = {split: [] for split in dataset.splits(source)}
    splits = {split: dataset.read(source, split, missed[split]) for split in missed}
    parts = parts_of_splits({split: found for split, (found, _) in splits.items()})
    wholes = [split for split in splits if split not in parts]
    studies, questions = ([record for split in wholes for record in splits[split][kind]] for kind in (0, 1))
    unread = [failure for split in wholes for failure in missed[split]]
    _writable(destination)
    shard, options = arguments.shard, {"shard": arguments.shard, "verify": arguments.verify}
    summary = prepare(source, studies, questions, processor, destination, arguments.workers, unread, **options)
    listing = destination / "failures.jsonl"
    failures = summary.pop("failures") if shard else read_lines(listing)
    total = len(failures) + summary["studies"]
    if shard:
        print(json.dumps(summary))
        print(f"When all {shard[1]} shards are done, run the command without --shard to finish {destination}.", file=sys.stderr)
    else:
        for name, value in (("Splits", summary["splits"]), ("Units", summary["units"]), ("Warnings", summary["warnings"])):
            print(f"{name:<12} " + (", ".join(f"{key} {count}" for key, count in value.items()) or "none"))
        print(f"{'Prepared':<12} {summary['studies']} studies, {summary['questions']} questions, fingerprint {summary['fingerprint']}")
        print(f"{'Details':<12} {destination / 'summary.json'}, {destination / 'summary.png'}")
    if failures and len(failures) == total and not shard:
        raise ValueError(f"none of the {total} studies of {source} could be prepared; {listing} says why.")
    for part, listed in parts.items() if not shard else ():
        without = {failure["study"] for failure in failures}
        path = destination / f"split_{part.replace('/', '_')}.json"
        write_json(path, {split: [study for study in ids if study not in without] for split, ids in listed.items()})
        print(f"All studies of split {part!r} are in another split, too; to use it, pass --split_file {path}", file=sys.stderr)
    if failures:
        where = "the run that finishes tries them again" if shard else f"{listing} lists them"
        print(f"Warning: {len(failures)} of {total} studies could not be prepared; {where}:", file=sys.stderr)
        for failure in failures[:FAILURES_SHOWN]:
            print(f"  {failure['study']}: {failure['reason']}", file=sys.stderr)
        if len(failures) > FAILURES_SHOWN:
            print(f"  and {len(failures) - FAILURES_SHOWN} more", file=sys.stderr)


def _audit(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets.audit import audit

    _workers(arguments)
    out = arguments.out or arguments.data / "audit"
    if arguments.data.is_dir():  # else reading it says what is wrong
        _writable(out)
    result = audit(arguments.data, out, arguments.workers, arguments.reports)
    for name, facts in result["duplicates"].items():
        print(f"{name}: {facts['groups']} groups of {facts['studies']} studies, {facts['across_splits']} of them across splits")
    for split, facts in result["deduplicated"].items():
        print(f"{split}: {facts['kept']} kept, {sum(facts['left_out'].values())} left out of {out / 'deduplicated.json'}")
    print(f"Tables and examples: {out / 'audit.md'}")


def _ask(arguments: argparse.Namespace) -> None:
    from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
    from med3dvlm.volume import read_volume

    question = REPORT_PROMPTS[0] if arguments.question is None else arguments.question
    volume = read_volume(arguments.scan, **_reading(arguments))  # before the model, so that a wrong file is told at once
    for warning in volume.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    chat = _load(arguments.model)
    answer = _print_pieces(chat.stream(volume, question, max_new_tokens=arguments.max_new_tokens))
    familiarity = chat.familiarity(volume)
    notices = [f"{answer.seconds:.1f} s, {answer.tokens} tokens, confidence {answer.confidence:.2f}"]
    if not answer.text:
        notices.append("The model gave no answer; ask in other words.")
    if familiarity is None:
        notices.append(f"Whether the model knows scans like this one cannot be told: {arguments.model} holds no familiarity.safetensors.")
    elif familiarity.message:
        notices.append(familiarity.message)
    print(*notices, RESEARCH_NOTICE, sep="\n", file=sys.stderr)


def _findings(arguments: argparse.Namespace) -> None:
    from med3dvlm.report_labels import command

    print(command.run(arguments))


def _load(model: Path) -> "Med3DChat":
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.inference import Med3DChat

    keep_freed_memory()
    _quiet_transformers()
    return Med3DChat.from_pretrained(model)


def _print_pieces(pieces: "Generator[str, None, Answer]") -> "Answer":
    with closing(pieces):
        while True:
            try:
                print(next(pieces), end="", flush=True)
            except StopIteration as end:
                print()
                answer: Answer = end.value
                return answer


def _convert(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints import convert_published

    _quiet_transformers()
    options = {key: getattr(arguments, key) for key in ("base", "text_encoder", "size", "lora_alpha", "verify")}
    print(convert_published(arguments.source, arguments.out, **options))


def _merge(arguments: argparse.Namespace) -> None:
    from med3dvlm.checkpoints import merge_lora
    from med3dvlm.files import whole_folder

    _quiet_transformers()
    with whole_folder(arguments.out) as aside:
        merge_lora(arguments.adapter, aside)
    print(f"{arguments.out} holds the merged model")


def _encoders(arguments: argparse.Namespace) -> None:
    from med3dvlm.encoders import list_encoders
    from med3dvlm.encoders.cost import table

    for line in table(arguments.names or list_encoders(), arguments.size, arguments.measure):
        print(line.rstrip(), flush=True)


def _quiet_transformers() -> None:
    """No bars for loading, no advice for developers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _workers(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers} but at least one process is needed")


def _writable(folder: Path) -> None:
    """Make the folder and see that files can be written there, before anything that takes time."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _sentence(error: Exception) -> str:
    """The error in one line."""
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        return place + REASONS.get(error.errno, error.strerror or str(error))
    if isinstance(error, SafetensorError):
        code = re.search(r"os error (\d+)", str(error))
        return f"a weights file: {REASONS.get(int(code[1]) if code else 0, str(error))}"
    if isinstance(error, BrokenExecutor):
        return "a worker process was killed, perhaps for want of memory; run the command again with fewer --workers"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
