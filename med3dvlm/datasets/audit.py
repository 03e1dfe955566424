"""Check a data set before training on it: duplicates, leaks between splits, questions whose answer can be guessed.

    <out>/audit.json          all figures, and the groups of duplicates as study ids
    <out>/audit.md            the same as tables, with the worst examples as study ids
    <out>/deduplicated.json   {split: [study ids]} for `--split-file` of training and evaluation
    <out>/thumbnails/         what was read of the volumes; an interrupted audit continues from there

deduplicated.json keeps the training split whole and takes studies out of the others, so that it serves for weights that were trained on
the whole split already. In order, test before validation, a split loses the studies whose patient is in an earlier split or whose volume
(nearly) equals one of an earlier split or an earlier one of its own. A report like one in training takes a study out only where that is
asked for: of 800 real CT-RATE reports 18 % have another patient's beside them that is as alike as SAME_REPORT, mostly normal findings.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.datasets import duplicates
from med3dvlm.datasets.duplicates import Pair
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import write_json, write_text
from med3dvlm.records import LETTERS, Question, Study
from med3dvlm.remote.address import is_address
from med3dvlm.remote.cache import Cache
from med3dvlm.tables import markdown_table

logger = logging.getLogger(__name__)

EXAMPLES = 10
FREQUENT = 20  # answers that are listed


def audit(
    root: str | Path, out: str | Path | None = None, workers: int = 2, by_reports: bool = False, cache: Cache | None = None
) -> dict[str, Any]:
    """Audit prepared data, write the files above and return what audit.json says.

    Args:
        root: a folder, or an address.
        out: default <root>/audit; a folder of this machine.
        workers: processes that read volumes.
        cache: for data at an address.
        by_reports: take out of deduplicated.json what has a (near-)duplicate report in an earlier split, too.
    """
    if out is None and is_address(root):
        raise ValueError(f"an audit is written to a folder of this machine, not to {root}; name one by --out")
    data = PreparedData(root, exclude_failures=True, cache=cache)
    data.require_room(2 * workers)
    out = Path(root) / "audit" if out is None else Path(out)
    splits = split_order(data.summary["splits"])
    studies = [study for split in splits for study in data.studies(split)]
    asked = {split: data.questions(split) for split in splits}
    pictures, checksums = duplicates.thumbnails(data, studies, out / "thumbnails", workers)
    same = duplicates.equal_groups(checksums)
    repeated = {place for group in same for place in group[1:]}
    distinct = [place for place in range(len(studies)) if place not in repeated]
    alike = duplicates.similar_volumes(data, [studies[place] for place in distinct], pictures[distinct], workers)
    near = [Pair(distinct[a], distinct[b], similarity) for a, b, similarity in alike]
    texts = [" ".join(duplicates.words(study.report)) for study in studies]
    same_report = [group for group in duplicates.equal_groups(texts) if texts[group[0]]]
    repeated = {place for group in same_report for place in group[1:]}
    distinct = [place for place in range(len(studies)) if place not in repeated]
    alike = duplicates.similar_reports([texts[place] for place in distinct])
    reworded = [Pair(distinct[a], distinct[b], similarity) for a, b, similarity in alike]
    volume_groups, report_groups = (
        duplicates.groups(len(studies), [*((group[0], other) for group in equal for other in group[1:]), *((a, b) for a, b, _ in pairs)])
        for equal, pairs in ((same, near), (same_report, reworded))
    )
    kept, left_out = deduplicate(studies, splits, volume_groups, report_groups if by_reports else None)
    result: dict[str, Any] = {
        "data": data.summary["fingerprint"],
        "studies": {split: len(data.studies(split)) for split in splits},
        "words": {split: report_lengths(data.studies(split)) for split in splits},
        "thresholds": {"volumes": duplicates.SAME_VOLUME, "reports": duplicates.SAME_REPORT},
        "patients_in_several_splits": _several_splits(studies),
        "duplicates": {
            "volumes, exact": _describe([list(group) for group in same], studies),
            "volumes, near": _describe(duplicates.equal_groups(volume_groups), studies, near),
            "reports, exact": _describe([list(group) for group in same_report], studies),
            "reports, near": _describe(duplicates.equal_groups(report_groups), studies, reworded),
        },
        "questions": {split: question_facts(asked[split]) for split in splits if asked[split]},
        "text_only": {
            split: {"question": text_only_baselines(asked[splits[0]], asked[split]), **choice_habits(asked[splits[0]], asked[split])}
            for split in splits[1:]
            if asked[split] and asked[splits[0]]
        },
        "labels": label_frequencies(studies),
        "deduplicated": {split: {"kept": len(kept[split]), "left_out": left_out[split]} for split in splits},
    }
    write_json(out / "deduplicated.json", kept)
    write_json(out / "audit.json", result)
    write_text(out / "audit.md", report(result))
    return result


def split_order(splits: Iterable[str]) -> list[str]:
    """Return the training split first, then the others by name: test before validation. Logs a warning where no name begins with "train"."""
    ordered = sorted(splits, key=lambda split: (not split.startswith("train"), split))
    if ordered and not ordered[0].startswith("train"):
        logger.warning("no split begins with 'train'; %r counts as the training split, which is kept whole", ordered[0])
    return ordered


def deduplicate(
    studies: Sequence[Study], splits: Sequence[str], volumes: Sequence[int], reports: Sequence[int] | None = None
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Return the ids that each split keeps (the first keeps all), and how many studies the others lose for which reason (the first that
    applies).

    Args:
        volumes, reports: the number of each study's group of (near-)duplicates.
    """
    seen: dict[str, set[Any]] = {"patient": set(), "volume": set(), "report": set()}
    kept: dict[str, list[str]] = {split: [] for split in splits}
    left_out: dict[str, dict[str, int]] = {split: dict.fromkeys(seen, 0) for split in splits}
    for split in splits:
        here = [(place, study) for place, study in enumerate(studies) if study.split == split]
        own: set[int] = set()
        for place, study in here:
            reasons = {
                "patient": study.patient in seen["patient"],
                "volume": volumes[place] in seen["volume"] or (split != splits[0] and volumes[place] in own),
                "report": reports is not None and reports[place] in seen["report"],
            }
            own.add(volumes[place])
            if reason := next((name for name, holds in reasons.items() if holds), None):
                left_out[split][reason] += 1
            else:
                kept[split].append(study.id)
        seen["patient"] |= {study.patient for _, study in here}
        seen["volume"] |= own
        seen["report"] |= {reports[place] for place, _ in here} if reports is not None else set()
    return kept, left_out


def _describe(groups: Sequence[Sequence[int]], studies: Sequence[Study], pairs: Sequence[Pair] = ()) -> dict[str, Any]:
    """Count the groups and list them as ids; for near duplicates also the pairs, the most similar first."""

    def across(name: str) -> int:
        return sum(len({getattr(studies[place], name) for place in group}) > 1 for group in groups)

    pairs = sorted(pairs, key=lambda pair: (studies[pair.first].split == studies[pair.second].split, -pair.similarity, pair))
    return {
        "groups": len(groups),
        "studies": sum(map(len, groups)),
        "across_splits": across("split"),
        "across_patients": across("patient"),
        "members": [[studies[place].id for place in group] for group in groups],
        "pairs": [[studies[pair.first].id, studies[pair.second].id, pair.similarity] for pair in pairs],
    }


def _several_splits(studies: Iterable[Study]) -> dict[str, Any]:
    where: dict[str, dict[str, str]] = defaultdict(dict)  # patient -> split -> one of the studies
    for study in studies:
        where[study.patient].setdefault(study.split, study.id)
    shared = [list(places.values()) for places in where.values() if len(places) > 1]
    return {"patients": len(shared), "examples": shared[:EXAMPLES]}


def question_facts(questions: Sequence[Question]) -> dict[str, Any]:
    """Return for each kind the number of questions, how many contain their answer, the frequent answers, and how often each letter is right."""
    facts = {}
    for kind, group in _by_kind(questions).items():
        telling = [question for question in group if tells_answer(question)]
        answers = Counter(question.answer for question in group)
        facts[kind] = {
            "questions": len(group),
            "tell_their_answer": len(telling),
            "examples": sorted({question.study for question in telling})[:EXAMPLES],
            "different_answers": len(answers),
            "answers": dict(sorted(answers.items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]),
            "letters": dict(sorted(Counter(question.letter for question in group if question.lettered).items())),
        }
    return facts


def tells_answer(question: Question) -> bool:
    """Return whether the question contains the answer word for word and none of its other choices. Yes and no do not count."""
    if question.yes_no:
        return False
    words = f" {' '.join(duplicates.words(question.text))} "
    named = [choice for choice in question.choices or (question.answer,) if f" {' '.join(duplicates.words(choice))} " in words]
    return named == [question.answer] and bool(duplicates.words(question.answer))


def report_lengths(studies: Iterable[Study]) -> dict[str, int]:
    """Return the words of each report. A text encoder reads a limited number of tokens, of which there are more than words; the rest is cut."""
    lengths = [len(study.report.split()) for study in studies]
    found = np.percentile(lengths, (0, 50, 95, 100), method="lower").tolist()
    return dict(zip(("least", "median", "95 %", "most"), map(int, found), strict=True))


def label_frequencies(studies: Iterable[Study]) -> dict[str, dict[str, list[int]]]:
    """Return label -> split -> [positive, labelled]."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for study in studies:
        for name, value in study.labels.items():
            found[name][study.split][0] += value
            found[name][study.split][1] += 1
    return {name: dict(found[name]) for name in sorted(found)}


def text_only_baselines(train: Iterable[Question], test: Iterable[Question]) -> dict[str, float]:
    """Return the accuracy by kind of the best guess without the volume: the choice that answered this very question most often in training.

    An open question is answered with what answered it, or else its kind, most often, and counts as right word for word.
    """
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        seen[question.text][question.answer] += 1
        seen[f"\n{question.kind}"][question.answer] += 1  # no question's text begins with a new line
    hits: dict[str, list[bool]] = {}
    for kind, group in _by_kind(test).items():
        for question in group:
            known = seen[question.text] or seen[f"\n{question.kind}"]
            options = question.choices or [answer for answer, _ in known.most_common(1)]
            guess = max(options, key=lambda choice: seen[question.text][choice], default=None)
            hits.setdefault(kind, []).append(guess == question.answer)
    return {kind: sum(values) / len(values) for kind, values in sorted(hits.items())}


def choice_habits(train: Iterable[Question], test: Iterable[Question]) -> dict[str, dict[str, float]]:
    """Return the accuracy by kind of closed questions of three guesses: a random choice, the letter most often right in training, the longest
    choice.
    """
    letters: dict[str, Counter[str]] = defaultdict(Counter)
    for kind, group in _by_kind(train).items():
        letters[kind].update(question.letter for question in group if question.lettered)
    habits: dict[str, dict[str, float]] = {"chance": {}, "letter": {}, "longest": {}}
    for kind, group in _by_kind(test).items():
        if closed := [question for question in group if question.choices]:
            usual = min(letters[kind], key=lambda letter: (-letters[kind][letter], letter), default=LETTERS[0])
            habits["chance"][kind] = float(np.mean([1 / len(question.choices) for question in closed]))
            habits["letter"][kind] = float(np.mean([question.lettered and question.letter == usual for question in closed]))
            habits["longest"][kind] = float(np.mean([question.answer == max(question.choices, key=len) for question in closed]))
    return habits


def _by_kind(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """Group questions by kind; yes/no questions are a kind of their own."""
    found: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        found["yes/no" if question.yes_no else question.kind].append(question)
    return dict(sorted(found.items()))


def report(result: Mapping[str, Any]) -> str:
    """Write audit.md."""
    found, splits = result["duplicates"], list(result["studies"])
    counts = ("groups", "studies", "across_splits", "across_patients")
    header = ("duplicates", "groups", "studies", "groups across splits", "groups across patients")
    parts = [
        "# Audit of the data",
        f"Data {result['data']}: {', '.join(f'{count} {split}' for split, count in result['studies'].items())}.",
        markdown_table(
            ("words of a report", "least", "median", "95 %", "most"), [[name, *row.values()] for name, row in result["words"].items()]
        ),
        "## Duplicates",
        markdown_table(header, [[name, *(facts[key] for key in counts)] for name, facts in found.items()]),
        f"Near: once aligned, the texture of volumes correlates at {result['thresholds']['volumes']} or more; reports share "
        f"{result['thresholds']['reports']:.0%} or more of their pairs of words, as normal ones often do without being copies. "
        "Near groups include the exact ones.",
        f"Patients in more than one split: {result['patients_in_several_splits']['patients']}.",
    ]
    for name, facts in found.items():
        if examples := [[*pair] for pair in facts["pairs"][:EXAMPLES]] or [[*group[:2], 1.0] for group in facts["members"][:EXAMPLES]]:
            parts += [f"### {name.capitalize()}: the first {len(examples)}", markdown_table(("study", "study", "similarity"), examples)]
    reasons = ("patient", "volume", "report")
    rows = [[split, facts["kept"], *(facts["left_out"][name] for name in reasons)] for split, facts in result["deduplicated"].items()]
    parts += [
        "## What deduplicated.json keeps",
        markdown_table(("split", "kept", "left out: patient", "left out: volume", "left out: report"), rows),
        f"{splits[0].capitalize()} is kept whole; the others lose what an earlier split, or an earlier study of their own, holds too.",
    ]
    if result["questions"]:
        rows = [
            [split, kind, facts["questions"], facts["tell_their_answer"], facts["different_answers"], _share(facts)]
            for split, kinds in result["questions"].items()
            for kind, facts in kinds.items()
        ]
        names = ("split", "kind", "questions", "tell their answer", "different answers", "share of the commonest")
        parts += ["## Questions", markdown_table(names, rows)]
    for split, tables in result["text_only"].items():
        rows = [[kind, *(tables[name].get(kind) for name in ("question", "chance", "letter", "longest"))] for kind in tables["question"]]
        parts += [
            f"## Answers without the scan: {split}",
            markdown_table(("kind", "usual answer to the question", "chance", "usual letter", "longest choice"), rows),
        ]
    if result["labels"]:
        rows = [[name, *(_positive(by_split.get(split)) for split in splits)] for name, by_split in result["labels"].items()]
        parts += ["## Labels: positive of stated", markdown_table(("label", *splits), rows)]
    return "\n\n".join(parts) + "\n"


def _share(facts: Mapping[str, Any]) -> float:
    return max(facts["answers"].values()) / facts["questions"]


def _positive(counts: Sequence[int] | None) -> str | None:
    return None if counts is None else f"{counts[0]} of {counts[1]}"
