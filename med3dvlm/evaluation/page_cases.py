"""The gallery of report.html (eval/page.py): each study with its slices, its texts with the findings marked, and its answers."""

import base64
import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.question_scores import likeliest
from med3dvlm.metrics.text import token_f1_values
from med3dvlm.plots.slices import grey, take_slice
from med3dvlm.records import Study
from med3dvlm.reports.findings import find_mentions

MARKS = ("agreed", "missed", "invented")
EDGE = 192  # voxels of a picture, at most
Row = dict[str, Any]


def gallery(runs: Mapping[str, Any], studies: Mapping[str, Study]) -> list[Row]:
    """Return a case for each study of any run."""
    answers: dict[str, list[Row]] = defaultdict(list)
    for row in runs["vqa"].rows if "vqa" in runs else ():
        answers[row["id"]].append(answered(row))
    reports = {row["id"]: row for row in runs["report"].rows} if "report" in runs else {}
    ranks = {row["id"]: row for row in runs["retrieval"].rows} if "retrieval" in runs else {}
    with_report = [name for name in reports if studies[name].report.strip()]
    pairs = [reports[name]["prediction"] for name in with_report], [studies[name].report for name in with_report]
    alike = dict(zip(with_report, token_f1_values(*pairs)["token_f1"], strict=True)) if with_report else {}
    cases = []
    for place, name in enumerate(dict.fromkeys([*reports, *answers, *ranks])):
        report = reports.get(name)
        reference, prediction = studies[name].report, report["prediction"] if report else None
        marks = marks_of(reference, prediction or "") if name in alike else {}
        count = Counter(marks.values())
        right = [answer["right"] for answer in answers[name] if answer["right"] is not None]
        compared = 2 * count["agreed"] + count["missed"] + count["invented"]
        cases.append(
            {
                "place": place,
                "id": name,
                "with_report": bool(reference.strip()),
                "reference": list(marked(reference, marks)),
                "prediction": list(marked(prediction, marks)) if prediction is not None else None,
                "findings": sorted(marks.items(), key=lambda item: (MARKS.index(item[1]), item[0])),
                **{mark: count[mark] for mark in MARKS},
                "f1": None if name not in alike else 2 * count["agreed"] / compared if compared else 1.0,
                "alike": None if name not in alike else float(alike[name]),
                "answers": answers[name],
                "right": sum(right) / len(right) if right else None,
                "counted": (int(sum(right)), len(right)),
                "rank": ranks.get(name, {}).get("image_to_text"),
            }
        )
    return cases


def answered(row: Row) -> Row:
    """Return a question with the choice taken, with and without the scan, and the written answer; None where it was not asked so."""
    chosen, blind = (likeliest(row, column) if row.get(column) else None for column in ("closed", "blind"))
    right = None if chosen is None else chosen == row["answer"]
    return {"kind": row["kind"], "question": row["question"], "answer": row["answer"], "chosen": chosen, "right": right, "blind": blind} | {
        "open": row.get("open")
    }


def marks_of(reference: str, prediction: str) -> dict[str, str]:
    """Return for each finding that either text states as present: agreed, missed or invented."""
    expected, stated = ({mention.finding for mention in find_mentions(text) if mention.present} for text in (reference, prediction))
    both = {finding: "agreed" for finding in expected & stated}
    return both | dict.fromkeys(expected - stated, "missed") | dict.fromkeys(stated - expected, "invented")


def marked(text: str, marks: Mapping[str, str]) -> Iterator[tuple[str, str | None, str | None]]:
    """Cut the text into pieces: (words, mark, finding) where a finding of `marks` is stated and (words, None, None) between."""
    done = 0
    for mention in find_mentions(text):
        begin, end = mention.start, mention.start + len(mention.phrase)
        if mention.present and mention.finding in marks and begin >= done:
            yield text[done:begin], None, None
            yield text[begin:end], marks[mention.finding], mention.finding
            done = end
    yield text[done:], None, None


def draw(cases: Sequence[Row], data: PreparedData, studies: Mapping[str, Study]) -> None:
    """Add three slices to each case: the middle one, and the middle row and column through all slices, the last on top."""
    low, high = data.processor.grid.values
    for case in cases:
        volume = data.processor.dequantize(data.volume(studies[case["id"]]))[0].numpy()  # (D, H, W)
        case["slices"] = []
        for axis, name in enumerate(("slice", "row", "column")):
            count = volume.shape[axis]
            plane, _ = take_slice(volume, axis, count // 2, None, "SPL")
            case["slices"].append((f"{name} {count // 2 + 1} of {count}", picture(grey(plane, (low, high)))))


def picture(plane: NDArray[np.uint8]) -> str:
    """Encode grey values (H, W), or colours (H, W, 3), as a data URI, PNG or JPEG, whichever is smaller."""
    from PIL import Image

    image = Image.fromarray(plane)
    image.thumbnail((EDGE, EDGE))
    forms = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        forms.append(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}")
    return min(forms, key=len)
