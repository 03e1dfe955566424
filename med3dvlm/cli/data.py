"""`phantom`, `prepare`, `audit`, `findings`: make, prepare and check data sets."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from med3dvlm.cli.options import (
    AUTO,
    MEANING,
    Commands,
    add_meaning,
    add_series,
    add_workers,
    check_workers,
    numbers,
    parse_shard,
    parse_size,
    reading,
    require_writable,
)
from med3dvlm.remote.address import is_address
from med3dvlm.remote.cache import add_cache, cache_of

if TYPE_CHECKING:
    from med3dvlm.datasets.outputs import Volumes
    from med3dvlm.datasets.sources import Scans

FAILURES_SHOWN = 10


def add_commands(commands: Commands) -> None:
    from med3dvlm.cli.findings import add_arguments as add_findings_arguments

    phantom = commands.add_parser("phantom", help="write a data set of CT phantoms with reports, questions, labels and masks")
    phantom.add_argument("out", metavar="OUT", type=Path, help="folder to write to")
    phantom.add_argument(
        "--layout", choices=("m3d", "ct_rate"), default="m3d",
        help="m3d: M3D-Cap and M3D-VQA; ct_rate: chests with the 18 findings of CT-RATE (default: %(default)s)",
    )  # fmt: skip
    phantom.add_argument(
        "--version", type=int, choices=(1, 2), help="version of CT-RATE's layout: 1 raw values, 2 HU with geometry (default: 2)"
    )
    phantom.add_argument("--studies", type=int, default=800, help="number of volumes (default: %(default)s)")
    phantom.add_argument("--seed", type=int, default=0, help="the same seed gives the same data (default: %(default)s)")
    phantom.add_argument("--detail", type=float, default=1.0, help="factor on the voxels along each axis (default: %(default)s)")
    add_workers(phantom)
    phantom.set_defaults(run=_phantom)

    prepare = commands.add_parser("prepare", help="preprocess every volume of a data set, once")
    prepare.add_argument(
        "dataset",
        metavar="DATASET",
        help="layout of SRC: m3d, ct_rate, m3d_seg, totalsegmentator, rex_grounding_ct, or table (a CSV or JSONL of your own)",
    )
    prepare.add_argument("source", metavar="SRC", help="the data set: a folder, or an address as s3://bucket/data")
    prepare.add_argument(
        "destination", metavar="DST", help="the prepared data: a folder, or an address; an interrupted preparation continues"
    )
    add_cache(prepare)
    prepare.add_argument(
        "--recipe", default="m3d", help="recipe of preprocessing: m3d, hu_window, ct_rate or ct_clip (default: %(default)s)"
    )
    prepare.add_argument(
        "--size", type=parse_size, metavar="D,H,W", help="voxels of a prepared volume (default: the recipe's; 128,256,256 for m3d)"
    )
    prepare.add_argument(
        "--target-spacing",
        type=numbers("Z,Y,X"),
        metavar="Z,Y,X",
        help="spacing of a prepared volume in mm along D, H and W, for ct_rate and ct_clip (default: the recipe's)",
    )  # fmt: skip
    prepare.add_argument("--straighten", action="store_true", help="first resample tilted or unevenly spaced slices to a regular grid")
    stated = prepare.add_argument_group("for scans of which the table does not state it")
    add_meaning(stated)
    add_series(stated)
    prepare.add_argument("--spacing", type=_renamed, help=argparse.SUPPRESS)
    prepare.add_argument(
        "--shard", type=parse_shard, metavar="I/N",
        help="the I-th of N parts; once all are done, run without this to finish. auto: any number of jobs with the same arguments share "
        "the work, and the last one finishes",
    )  # fmt: skip
    prepare.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="local: --workers processes here; ray: the Ray cluster of RAY_ADDRESS or of this machine, one core a scan (default: %(default)s)",
    )  # fmt: skip
    prepare.add_argument("--verify", action="store_true", help="check all prepared volumes and prepare the damaged ones anew")
    add_workers(prepare)
    prepare.set_defaults(run=_prepare)

    audit = commands.add_parser(
        "audit", help="search prepared data for duplicates, leaks between splits and questions that contain their answer"
    )
    audit.add_argument("data", metavar="DST", help="the prepared data: a folder, or an address; an interrupted audit continues")
    add_cache(audit)
    audit.add_argument("--out", type=Path, metavar="DIR", help="folder of audit.md, audit.json, deduplicated.json (default: DST/audit)")
    audit.add_argument(
        "--reports",
        action="store_true",
        help="leave a study out of deduplicated.json also where only its report occurs in an earlier split",
    )
    add_workers(audit)
    audit.set_defaults(run=_audit)

    findings = commands.add_parser(
        "findings", help="read findings in reports, by rules or a classifier; train a classifier on labelled reports, or score one"
    )
    add_findings_arguments(findings)
    findings.set_defaults(run=_findings)


def _renamed(_: str) -> None:
    raise argparse.ArgumentTypeError(
        "would be the spacing of a scan, which the table's column spacing states; for that of the prepared volumes use --target-spacing"
    )


def _phantom(arguments: argparse.Namespace) -> None:
    check_workers(arguments)
    if arguments.version and arguments.layout != "ct_rate":
        raise ValueError("--version chooses a version of CT-RATE's layout; add --layout ct_rate, or leave it out")
    require_writable(arguments.out)
    (_phantom_ct_rate if arguments.layout == "ct_rate" else _phantom_m3d)(arguments)


def _phantom_ct_rate(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets.phantom.ct_rate import write_ct_rate

    version = arguments.version or 2
    plans = write_ct_rate(arguments.out, arguments.studies, arguments.seed, arguments.detail, version, arguments.workers)
    for split in ("train", "valid"):
        names = [plan.name for plan in plans if plan.split == split]
        print(f"{split:<6} {len(names)} volumes of {len({name.rsplit('_', 2)[0] for name in names})} patients in {arguments.out}")


def _phantom_m3d(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets import m3d
    from med3dvlm.datasets.audit import text_only_baselines
    from med3dvlm.datasets.phantom import write_phantoms

    studies = write_phantoms(arguments.out, arguments.studies, arguments.seed, arguments.detail, arguments.workers)
    counts = ", ".join(f"{sum(study.split == split for study in studies)} {split}" for split in m3d.SPLITS)
    print(f"{len(studies)} studies of {len({study.patient for study in studies})} patients in {arguments.out}: {counts}")
    baselines = text_only_baselines(m3d.read(arguments.out, "train")[1], m3d.read(arguments.out, "test")[1])
    print("Accuracy on the test questions without looking at the scan (the choice that was right most often in training):")
    for kind, accuracy in baselines.items():
        print(f"  {kind:<12} {accuracy:.3f}")


def _prepare(arguments: argparse.Namespace) -> int:
    """Prepare a data set. Returns the exit code: 1 where some studies could not be prepared."""
    from med3dvlm.datasets import DATASETS
    from med3dvlm.datasets.outputs import open_volumes
    from med3dvlm.datasets.sources import open_scans

    check_workers(arguments)
    if arguments.dataset not in DATASETS:
        raise ValueError(f"data set {arguments.dataset!r} is unknown; known: {', '.join(DATASETS)}")
    stated = reading(arguments, (*MEANING, "series"))
    if stated and arguments.dataset in ("ct_rate", "rex_grounding_ct"):
        raise ValueError(f"--{min(stated)} is for scans without metadata, but CT-RATE's metadata state it; leave it out")
    if arguments.shard and arguments.engine != "local":
        raise ValueError("--shard shares work between jobs, and --engine ray between the machines of a cluster; leave one of them out")
    cache = cache_of(arguments)
    volumes = open_volumes(arguments.destination, cache)
    if is_address(arguments.destination):
        volumes.require_writable()  # before a long list of scans is asked for
    with open_scans(arguments.source, cache, arguments.workers) as scans:
        return _prepare_scans(arguments, DATASETS[arguments.dataset], scans, volumes, stated)


def _prepare_scans(arguments: argparse.Namespace, dataset: Any, scans: "Scans", volumes: "Volumes", stated: dict[str, Any]) -> int:
    from med3dvlm.datasets.claims import prepare_claimed
    from med3dvlm.datasets.preparation import prepare, prepare_shard
    from med3dvlm.files import json_text, read_lines
    from med3dvlm.preprocessing import VolumeProcessor
    from med3dvlm.records import Records, nested_splits

    processor = VolumeProcessor(arguments.recipe, size=arguments.size, spacing=arguments.target_spacing, straighten=arguments.straighten)
    missed: dict[str, list[dict[str, str]]] = {split: [] for split in dataset.splits(scans.folder)}
    splits = {split: dataset.read(scans.folder, split, missed[split]) for split in missed}
    parts = nested_splits({split: found for split, (found, _) in splits.items()})
    wholes = [split for split in splits if split not in parts]
    studies, questions = ([record for split in wholes for record in splits[split][kind]] for kind in (0, 1))
    studies = [replace(study, reading=with_defaults(stated, study.reading)) for study in studies] if stated else studies
    unread = [failure | {"reason": scans.with_address(failure["reason"])} for split in wholes for failure in missed[split]]
    records = Records(studies, questions, unread)
    volumes.require_writable()
    shard, workers, verify = arguments.shard, arguments.workers, arguments.verify
    if shard == AUTO:
        shard, finished = None, prepare_claimed(scans, records, processor, volumes, workers, verify)
        if finished is None:
            print("The volumes are prepared; another job has finished the work.", file=sys.stderr)
            return 0
        summary = finished
    elif shard:
        summary = prepare_shard(scans, studies, processor, volumes, shard, workers, verify)
    else:
        summary = prepare(scans, records, processor, volumes, workers, verify, arguments.engine)
    listing = f"{volumes.name}/failures.jsonl"
    if shard:
        failures = summary.pop("failures")
        print(json.dumps(summary))
        print(f"When all {shard[1]} shards are done, run the command without --shard to finish {volumes.name}.", file=sys.stderr)
    else:
        with volumes.here("failures.jsonl") as path:
            failures = read_lines(path)
        for name, value in (("Splits", summary["splits"]), ("Units", summary["units"]), ("Warnings", summary["warnings"])):
            print(f"{name:<12} " + (", ".join(f"{key} {count}" for key, count in value.items()) or "none"))
        print(f"{'Prepared':<12} {summary['studies']} studies, {summary['questions']} questions, fingerprint {summary['fingerprint']}")
        doubts = f", {volumes.name}/warnings.jsonl" if summary["warnings"] else ""
        print(f"{'Details':<12} {volumes.name}/summary.json, {volumes.name}/summary.png{doubts}")
    total = len(failures) + summary["studies"]
    if failures and len(failures) == total and not shard:
        raise ValueError(f"none of the {total} studies of {scans.name} could be prepared; {listing} says why.")
    for part, listed in parts.items() if not shard else ():
        without = {failure["study"] for failure in failures}
        place = f"split_{part.replace('/', '_')}.json"
        volumes.write(place, json_text({split: [study for study in ids if study not in without] for split, ids in listed.items()}).encode())
        print(
            f"All studies of split {part!r} are in another split, too; to use it, pass --split-file {volumes.name}/{place}", file=sys.stderr
        )
    if failures:
        where = "the run that finishes tries them again" if shard else f"{listing} lists them"
        print(f"Warning: {len(failures)} of {total} studies could not be prepared; {where}:", file=sys.stderr)
        for failure in failures[:FAILURES_SHOWN]:
            print(f"  {failure['study']}: {failure['reason']}", file=sys.stderr)
        if len(failures) > FAILURES_SHOWN:
            print(f"  and {len(failures) - FAILURES_SHOWN} more", file=sys.stderr)
    return 1 if failures and not shard else 0


def with_defaults(defaults: dict[str, Any], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the options stated for all scans, but for those that the table states for a scan; the meaning of values is taken as a whole."""
    meaning = {"unit", "hu", "rescale"}
    return {name: value for name, value in defaults.items() if not (name in meaning and meaning & stated.keys())} | stated


def _audit(arguments: argparse.Namespace) -> None:
    from med3dvlm.datasets.audit import audit

    check_workers(arguments)
    remote = is_address(arguments.data)
    out = arguments.out or (None if remote else Path(arguments.data) / "audit")
    if out is not None and (remote or Path(arguments.data).is_dir()):  # otherwise reading it raises the error
        require_writable(out)
    result = audit(arguments.data, out, arguments.workers, arguments.reports, cache_of(arguments))
    assert out is not None
    for name, facts in result["duplicates"].items():
        print(f"{name}: {facts['groups']} groups of {facts['studies']} studies, {facts['across_splits']} of them across splits")
    for split, facts in result["deduplicated"].items():
        print(f"{split}: {facts['kept']} kept, {sum(facts['left_out'].values())} left out of {out / 'deduplicated.json'}")
    print(f"Tables and examples: {out / 'audit.md'}")


def _findings(arguments: argparse.Namespace) -> None:
    from med3dvlm.cli import findings

    print(findings.run(arguments))
