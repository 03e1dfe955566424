"""Write the result of a case as the JSON that case.schema.json describes, and tables of many cases."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.files import atomic_file, write_text
from med3dvlm.inference.engine import Generation
from med3dvlm.inference.out_of_distribution import OutOfDistributionScore
from med3dvlm.reports.draft import Report, read_report

SCHEMA = "urn:med3dvlm:case:1"
STATES = ("present", "uncertain", "absent")
Record = dict[str, Any]


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads((files("med3dvlm.worklist") / "case.schema.json").read_text(encoding="utf-8-sig")))


def checked(record: Record) -> Record:
    """Return the record as JSON gives it back. Raises RuntimeError where it breaks the schema, which is a defect."""
    record = json.loads(json.dumps(record))
    if (error := next(_validator().iter_errors(record), None)) is not None:
        raise RuntimeError(f"the record of {record['id']} breaks its schema: {error.message} at {error.json_path}")
    return record


def answer_of(answer: Generation) -> Record:
    """Describe a report or an answer. Confidence is rounded, so that it does not depend on the other rows of the batch."""
    return {"text": answer.text, "finish": answer.finish, "tokens": len(answer.tokens), "confidence": round(answer.confidence, 2)}


def report_of(answer: Generation) -> Record:
    report = _drafted(answer.text)
    sections = () if report is None else report.sections
    return answer_of(answer) | {"sections": [{"heading": section.heading, "text": section.text} for section in sections]}


def findings_of(text: str | None, probabilities: dict[str, float]) -> Record:
    """List findings with their state in the report and the probability that a contrastive model gives them."""
    report = _drafted(text or "")
    stated = {} if report is None else report.findings
    names = [*probabilities, *(name for name in stated if name not in probabilities)]
    return {
        name: {"stated": stated.get(name), "probability": round(probabilities[name], 4) if name in probabilities else None}
        for name in names
    }


def _drafted(text: str) -> Report | None:
    """Read a report; None where there are no words in it."""
    try:
        return read_report(text)
    except ValueError:
        return None


def out_of_distribution_of(score: OutOfDistributionScore | None) -> Record | None:
    if score is None:
        return None
    return {"distance": round(score.distance, 4), "limit": round(score.limit, 4), "outside": score.message is not None}


def is_cut(record: Record) -> bool:
    """Return whether an answer was cut by its length."""
    return any(answer["finish"] == "length" for answer in (record["report"], *record["answers"]) if answer is not None)


def write_table(path: Path, records: Iterable[Record]) -> None:
    """Write a CSV with a row for each case: report, findings, masks, warnings, probabilities, answers."""
    rows = [_row(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    groups = ("probability:", "question_", "answer_", "answer_finish_")  # after the rest, by number
    columns = [name for name in columns if not name.startswith(groups)] + [name for name in columns if name.startswith(groups)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _row(record: Record) -> Record:
    report, known = record["report"], record["out_of_distribution"]
    row = {"id": record["id"], "report": "", "report_finish": "", "report_confidence": ""}
    if report is not None:
        row |= {"report": report["text"], "report_finish": report["finish"], "report_confidence": report["confidence"]}
    for state in STATES:
        row[f"findings_{state}"] = ";".join(name for name, found in record["findings"].items() if found["stated"] == state)
    row["outside_training_data"] = "" if known is None else str(known["outside"]).lower()
    row["masks"] = ";".join(mask["file"] for mask in record["masks"] or () if mask["found"])
    row["warnings"] = " ".join(record["warnings"])
    row["sha256"], row["notice"] = record["scan"]["sha256"], record["notice"]
    row |= {f"probability:{name}": found["probability"] for name, found in record["findings"].items() if found["probability"] is not None}
    for number, answer in enumerate(record["answers"], start=1):
        row |= {f"question_{number}": answer["question"], f"answer_{number}": answer["text"], f"answer_finish_{number}": answer["finish"]}
    return row


def write_embeddings(path: Path, ids: Sequence[str], vectors: Sequence[NDArray[np.float32]]) -> None:
    """Write a Parquet table with the columns id and embedding (a list of float32 of one length)."""
    import pyarrow
    from pyarrow.parquet import write_table as write_parquet

    width = len(vectors[0]) if vectors else 0
    flat = pyarrow.array(np.concatenate([np.zeros(0, np.float32), *vectors]))
    columns = {"id": pyarrow.array(ids, pyarrow.string()), "embedding": pyarrow.FixedSizeListArray.from_arrays(flat, width)}
    with atomic_file(path) as aside:
        write_parquet(pyarrow.table(columns), aside)
