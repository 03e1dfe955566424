"""Read findings in reports, by rules or by a classifier, and see how well on labelled ones.

    med3dvlm findings read REPORTS.csv --out findings.csv               a column of 0 and 1 for each finding
    med3dvlm findings score REPORTS.csv                                 the rules, finding by finding
    med3dvlm findings score REPORTS.csv --half held-out --errors errors.jsonl
    med3dvlm findings train REPORTS.csv OUT                             a classifier of your own
    med3dvlm findings score OTHER.csv --classifier OUT
    med3dvlm findings score OTHER.csv --classifier RadBertClassifier.pth

REPORTS.csv has the column report_text, report or text (or Findings_EN and Impressions_EN) and, for all but `read`, one per finding with 0
and 1; CT-RATE keeps the findings in a second file: --labels LABELS.csv.
"""

import argparse
import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.labelled_reports import HALVES, LabelledReports, read_labelled_reports, read_reports
from med3dvlm.files import atomic_folder, write_json, write_lines, write_text
from med3dvlm.metrics.classification import crg, precision_recall_f1
from med3dvlm.metrics.findings import error_kind
from med3dvlm.reports.classifiers.linear import LinearClassifier
from med3dvlm.reports.classifiers.radbert import ENCODER, RadBertClassifier
from med3dvlm.reports.findings import FINDINGS, find_mentions, findings_table

logger = logging.getLogger(__name__)

COLUMNS = "the column report_text, report or text, or the columns Findings_EN and Impressions_EN"
LABELLED = f"a CSV file with {COLUMNS}, and a column of 0 and 1 for each finding"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands below `med3dvlm findings`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    read = commands.add_parser("read", help="read findings in reports into a table")
    read.add_argument(
        "reports", metavar="REPORTS", type=Path,
        help=f"a CSV file with {COLUMNS}; the ids are in AccessionNo, VolumeName or id, else the rows' numbers",
    )  # fmt: skip
    read.add_argument(
        "--out", metavar="FILE", type=Path, required=True,
        help="the CSV file: a row for each report, with its id and, for each finding, 1 where it is stated as present, else 0; no value where "
        "there is no text",
    )  # fmt: skip
    train = commands.add_parser("train", help="learn a classifier from labelled reports")
    train.add_argument("reports", metavar="REPORTS", type=Path, help=LABELLED)
    train.add_argument("out", metavar="OUT", type=Path, help="the folder of the classifier, which must not exist yet")
    train.add_argument("--text-only", action="store_true", help="learn from the words alone, without the findings that the rules read")
    score = commands.add_parser("score", help="compare what is read in reports with their labels")
    score.add_argument("reports", metavar="REPORTS", type=Path, help=LABELLED)
    for command in (read, score):
        command.add_argument(
            "--classifier", metavar="PATH", type=Path, help="a folder from `train`, or RadBertClassifier.pth (default: the rules)"
        )
        command.add_argument("--encoder", metavar="MODEL", default=ENCODER, help="RadBERT's folder or hub id (default: %(default)s)")
    score.add_argument("--out", metavar="FILE", type=Path, help="write the scores into this JSON file, too")
    score.add_argument(
        "--errors", metavar="FILE", type=Path, help="write each disagreement with its sentences into this JSON-lines file (rules)"
    )
    for command in (train, score):
        command.add_argument("--labels", metavar="LABELS", type=Path, help="a CSV file with the findings, where REPORTS has none")
        command.add_argument("--half", choices=HALVES, help="one half of the patients only, by a fixed hash of their names")


def run(arguments: argparse.Namespace) -> str:
    """Carry out a command; returns what to print, in Markdown.

    Raises:
        OSError, ValueError: a file is missing or wrong; the message says which and what is needed.
    """
    if arguments.action == "read":
        return _write(arguments)
    reports = read_labelled_reports(arguments.reports, arguments.labels)
    if arguments.half:
        reports = reports.half(arguments.half)
    return _train(arguments, reports) if arguments.action == "train" else _score(arguments, reports)


def _write(arguments: argparse.Namespace) -> str:
    if arguments.out.resolve() == arguments.reports.resolve():
        raise ValueError(f"--out is {arguments.out}, the file of the reports; name another one")
    reports = read_reports(arguments.reports)
    names, stated, reader = _read(arguments, reports.texts)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow((reports.column, *names))
    for identity, text, row in zip(reports.ids, reports.texts, stated.tolist(), strict=True):
        writer.writerow((identity, *(row if text else [""] * len(names))))
    write_text(arguments.out, table.getvalue())
    silent = f" Without a text, and so without values: {reports.texts.count('')}." if "" in reports.texts else ""
    return f"{arguments.out}: {len(names)} findings of {len(reports.texts)} reports, read by {reader}.{silent}"


def _train(arguments: argparse.Namespace, reports: LabelledReports) -> str:
    rules = [] if arguments.text_only else [name for name in reports.names if name in FINDINGS]
    with atomic_folder(arguments.out) as folder:
        classifier = LinearClassifier.train(reports.texts, reports.labels, reports.names, rules)
        classifier.save(folder)
    return (
        f"{arguments.out}: {len(reports.names)} findings learned from {len(reports.texts)} reports of {len(set(reports.patients))} patients, "
        f"{len(classifier.vocabulary)} terms, {len(rules)} readings of the rules. Score it on reports of other patients."
    )


def _score(arguments: argparse.Namespace, reports: LabelledReports) -> str:
    if arguments.classifier and arguments.errors:
        raise ValueError("--errors shows the sentences that the rules read; a classifier has none, so leave out one of the two")
    names, stated, reader = _read(arguments, reports.texts, reports.names)
    labels = reports.labels[:, [reports.names.index(name) for name in names]]
    scores = precision_recall_f1(labels, stated, names) | {"crg": crg(labels, stated)}
    errors = [] if arguments.classifier else _errors(reports, names, labels, stated)
    if arguments.errors:
        write_lines(arguments.errors, errors)
    kinds = dict(Counter(error["kind"] for error in errors).most_common())
    if arguments.out:
        result = {"reader": reader, "half": arguments.half, "reports": len(reports.texts), "patients": len(set(reports.patients))}
        write_json(arguments.out, result | scores | {"error_kinds": kinds})
    of_half = f", the {arguments.half} half" if arguments.half else ""
    lines = [f"{len(reports.texts)} reports of {len(set(reports.patients))} patients{of_half}, read by {reader}.", "", *_table(scores)]
    if kinds:
        lines += ["", "| disagreements | number |", "|---|---:|", *(f"| {kind} | {number} |" for kind, number in kinds.items())]
    return "\n".join(lines)


def _read(
    arguments: argparse.Namespace, texts: Sequence[str], labelled: Sequence[str] | None = None
) -> tuple[list[str], NDArray[np.int64], str]:
    """Return the findings that the reader knows, of the `labelled` ones if given, what is read of them (N, K), and the reader's name."""
    if arguments.classifier is None:
        names = _shared(labelled, FINDINGS, "the rules")
        return names, findings_table(texts, names), "the rules"
    classifier: LinearClassifier | RadBertClassifier
    if arguments.classifier.is_dir():
        classifier = LinearClassifier.load(arguments.classifier)
    else:
        classifier = RadBertClassifier(arguments.classifier, arguments.encoder)
    names = _shared(labelled, classifier.names, str(arguments.classifier))
    return names, classifier.table(texts)[:, [classifier.names.index(name) for name in names]], str(arguments.classifier)


def _shared(labelled: Sequence[str] | None, known: Sequence[str], reader: str) -> list[str]:
    if labelled is None:
        return list(known)
    if left_out := [name for name in labelled if name not in known]:
        logger.warning("Not scored, as %s does not know them: %s", reader, ", ".join(left_out))
    names = [name for name in labelled if name in known]
    if not names:
        raise ValueError(f"None of the labels ({', '.join(labelled)}) is a finding that {reader} knows ({', '.join(known)})")
    return names


def _errors(reports: LabelledReports, names: Sequence[str], labels: NDArray[np.int64], stated: NDArray[np.int64]) -> list[dict[str, Any]]:
    errors = []
    for row, column in np.argwhere(labels != stated):
        mentions = find_mentions(reports.texts[row], [names[column]])
        errors.append(
            {
                "id": reports.ids[row],
                "finding": names[column],
                "label": int(labels[row, column]),
                "kind": error_kind(int(labels[row, column]), mentions),
                "mentions": [{"phrase": one.phrase, "taken back by": one.cue, "sentence": one.sentence} for one in mentions],
            }
        )
    return errors


def _table(scores: dict[str, Any]) -> list[str]:
    def row(name: str, entry: dict[str, Any], *counts: object) -> str:
        values = ["-" if entry[key] is None else f"{entry[key]:.3f}" for key in ("precision", "recall", "f1")]
        return f"| {' | '.join([name, *values, *map(str, counts)])} |"

    lines = ["| finding | precision | recall | F1 | labelled | read |", "|---|---:|---:|---:|---:|---:|"]
    lines += [row(name.replace("_", " "), entry, entry["support"], entry["predicted"]) for name, entry in scores["per_class"].items()]
    lines += [row(f"**{average}**", scores[average], "", "") for average in ("macro", "micro")]
    return [*lines, "", f"CRG {'-' if scores['crg'] is None else format(scores['crg'], '.3f')}"]
