"""Run a model over a worklist: processes, here or of a Ray cluster, read and prepare scans ahead, and one engine answers a batch of them at a time.

Which scans share a batch depends on their order alone, and a batch in which something is missing is answered again as a whole: so results do
not depend on the number of processes, nor on how often the run was stopped.
"""

import hashlib
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from med3dvlm.datasets.engines import Begin, open_engine
from med3dvlm.files import atomic_file, json_lines, write_json, write_lines
from med3dvlm.inference.engine import Engine, Generation, Request
from med3dvlm.inference.out_of_distribution import Features, pool_features
from med3dvlm.inference.pointing import places_in
from med3dvlm.inference.segmentation import PRESENCE_WHERE_STATED, Segmentation, numbered_file
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.prompts import REPORT_PROMPTS, RESEARCH_NOTICE
from med3dvlm.recipes import RECIPES
from med3dvlm.worklist import records
from med3dvlm.worklist.journal import Journal, embedding_in, line_of, locked, settle, state
from med3dvlm.worklist.reading import Case, Failure, open_volume, read_on_any_machine
from med3dvlm.worklist.scans import Scan

PACKAGES = ("med3dvlm", "torch", "transformers", "monai", "numpy")
_Begun = tuple[Scan, str | None, Callable[[], Any]]  # what is read, the state of its files before, what waits for its cases
AHEAD, AHEAD_BYTES = 2, 2**31  # batches that are read while one is answered, and the memory of their voxels


@dataclass(frozen=True)
class Settings:
    """What to do with every scan. `series` is a rule of series.py; `reading` holds arguments of `read_volume`, which a table may replace."""

    report: bool = True
    questions: tuple[str, ...] = ()
    max_new_tokens: int = 256
    series: str = "thin-axial"
    masks: bool = False
    embed: bool = False
    straighten: bool = False
    reading: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """The models at work. `about` names them with their fingerprints, as in case.schema.json."""

    chat: Any
    engine: Engine
    embedder: Any
    segmenter: Any
    about: dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """Numbers of cases with a result, of scans or series without one, and of cases with an answer that was cut."""

    cases: int
    failures: int
    cut: int


def run(
    scans: Sequence[Scan],
    out: Path,
    settings: Settings,
    folders: Sequence[Path],
    load: Any,
    workers: int = 2,
    batch_size: int = 16,
    workers_on: str = "local",
) -> Counts:
    """Write results.jsonl, results.csv, failures.jsonl, manifest.json, a file a case, and embeddings.parquet where it is wanted.

    Args:
        folders: those of the models that read scans: the vision-language model's, then perhaps a contrastive one's.
        load: gives the Models; called once, while scans are read already.
        workers: processes that read.
        batch_size: scans that are answered together.
        workers_on: "local", or "ray", whose cluster reads in the place of `workers` processes here (see `datasets.engines`).

    Raises:
        OSError, ValueError: `out` holds something else, or a model is missing.
    """
    with locked(out):
        journal = Journal(out)
        processors = [VolumeProcessor.from_pretrained(folder) for folder in folders]
        for processor in processors:
            processor.straighten |= settings.straighten
            RECIPES[processor.recipe].steps(processor)  # imports what it needs, once for all forked processes
        batches = [scans[first : first + batch_size] for first in range(0, len(scans), batch_size)]
        missing = [[scan for scan in batch if not journal.is_done(scan)] for batch in batches]
        todo = [(batch, stale) for batch, stale in zip(batches, missing, strict=True) if stale]
        with open_engine(workers_on, workers) as pool:
            size = sum(math.prod(processor.size) * processor.stored_dtype.itemsize for processor in processors)
            ahead = max(pool.workers, min(AHEAD * batch_size, AHEAD_BYTES // size))
            read = partial(read_on_any_machine, _root(scans), processors=processors, rule=settings.series)
            reader = _Reader(pool.start(read, str), todo, ahead)
            models: Models = load()
            try:
                settle(out, {"notice": RESEARCH_NOTICE, "models": models.about, "settings": vars(settings), "versions": versions()})
                done = len(scans) - sum(len(stale) for _, stale in todo)
                with tqdm(total=len(scans), initial=done, unit="scan", desc="scans", smoothing=0.05) as progress:
                    for batch, stale in todo:
                        _Batch(models, settings, journal).work(batch, stale, reader)
                        progress.update(len(stale))
            finally:
                models.engine.close()
        return _finish(scans, journal, settings, models.about)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _root(scans: Sequence[Scan]) -> Path:
    """Return the deepest folder that is there and below which all scans are."""
    folder = Path(os.path.commonpath([_absolute(scan).path.parent for scan in scans]))
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _absolute(scan: Scan) -> Scan:
    """Name the scan as a process of another working folder finds it."""
    return replace(scan, path=Path(os.path.abspath(scan.path)))


class _Reader:
    """Reads the scans that are missing ahead, in their order, and others on demand."""

    def __init__(self, begin: Begin, todo: Sequence[tuple[Sequence[Scan], Sequence[Scan]]], ahead: int) -> None:
        self.begin, self.ahead = begin, ahead
        self._next: Iterator[Scan] = (scan for _, stale in todo for scan in stale)
        self._running: deque[_Begun] = deque()
        self._fill()

    def _fill(self) -> None:
        for scan in islice(self._next, self.ahead - len(self._running)):
            self._running.append(self._begun(scan))

    def _begun(self, scan: Scan) -> _Begun:
        return scan, state(scan), self.begin(_absolute(scan))

    def take(self, scans: Sequence[Scan], again: bool = False) -> Iterator[tuple[Scan, str | None, list[Case | Failure]]]:
        """Yield the cases of scans: the next of those that are missing, or with `again` any others."""
        begun = deque(self._begun(scan) for scan in scans) if again else None
        for _ in scans:
            scan, seen, wait = (self._running if begun is None else begun).popleft()
            cases = wait()
            if isinstance(cases, str):  # it has killed its processes
                cases = [Failure(scan.id, cases)]
            if begun is None:
                self._fill()
            yield scan, seen, cases


@dataclass
class _Asked:
    """A case while it is answered."""

    case: Case
    features: Features
    embedding: NDArray[np.float32] | None
    probabilities: dict[str, float]
    out_of_distribution: Any
    questions: list[str]
    answers: list[Generation] = field(default_factory=list)


class _Batch:
    """Answers about a batch of scans and writes the results."""

    def __init__(self, models: Models, settings: Settings, journal: Journal) -> None:
        self.models, self.settings, self.journal = models, settings, journal

    def work(self, batch: Sequence[Scan], stale: Sequence[Scan], reader: _Reader) -> None:
        started = time.perf_counter()
        found = {scan.id: (seen, self._encoded(cases)) for scan, seen, cases in reader.take(stale)}
        if any(isinstance(each, _Asked) for _, cases in found.values() for each in cases):
            others = [scan for scan in batch if scan not in stale]
            found |= {scan.id: (seen, self._encoded(cases)) for scan, seen, cases in reader.take(others, again=True)}
        found = {scan.id: found[scan.id] for scan in batch if scan.id in found}  # in the order in which an undisturbed run asks
        outcomes = self._answered([each for _, cases in found.values() for each in cases])
        seconds = (time.perf_counter() - started) / max(1, len(found))
        lines = []
        for scan in batch:
            if scan.id in found:
                seen, cases = found[scan.id]
                ended = [outcomes.get(id(each), each) for each in cases]
                made = [each for each in ended if isinstance(each, _Asked)]
                failures = [vars(each) for each in ended if isinstance(each, Failure)]
                vectors = {each.case.id: each.embedding for each in made if each.embedding is not None}
                lines.append(line_of(scan, seen, [each.case.id for each in made], failures, vectors, seconds))
        self.journal.add(lines)

    def _encoded(self, cases: Sequence[Case | Failure]) -> list[_Asked | Failure]:
        """Encode each case and drop its voxels."""
        return [self._encode(case) if isinstance(case, Case) else case for case in cases]

    def _encode(self, case: Case) -> _Asked:
        voxels = [torch.tensor(each) for each in case.voxels]  # a copy, as Ray's arrays can only be read
        chat, embedder = self.models.chat, self.models.embedder
        features = chat.encode(voxels[0])
        embedding, probabilities = None, {}
        if embedder is not None:
            vector = embedder.volumes(embedder.processor.image_processor(voxels[1])["pixel_values"])[0]
            embedding, probabilities = vector.numpy(), embedder.probabilities(vector)
        elif self.settings.embed:
            embedding = pool_features(features)[0].cpu().numpy()
        asked = dict.fromkeys((*self.settings.questions, *case.scan.questions))
        kept = embedding if self.settings.embed else None
        return _Asked(replace(case, voxels=()), features, kept, probabilities, chat.out_of_distribution(features), list(asked))

    def _answered(self, cases: Sequence[_Asked | Failure]) -> dict[int, Failure]:
        """Ask about all cases at once and write the results; return the failures by `id` of their case."""
        asked = [each for each in cases if isinstance(each, _Asked)]
        prompts = [[*(REPORT_PROMPTS[:1] if self.settings.report else ()), *each.questions] for each in asked]
        requests = [
            Request(each.features, [{"role": "user", "content": prompt}], self.settings.max_new_tokens)
            for each, own in zip(asked, prompts, strict=True)
            for prompt in own
        ]
        streams = iter(self.models.engine.generate(requests))
        outcomes = {}
        for each, own in zip(asked, prompts, strict=True):
            mine = list(islice(streams, len(own)))
            try:
                each.answers = [stream.result() for stream in mine]
                self._write(each)
            except ValueError as error:  # a question that is too long, a scan that was changed meanwhile
                outcomes[id(each)] = Failure(each.case.id, str(error))
        return outcomes

    def _write(self, asked: _Asked) -> None:
        case, answers = asked.case, list(asked.answers)
        report = answers.pop(0) if self.settings.report else None
        record: dict[str, Any] = {
            "schema": records.SCHEMA,
            "id": case.id,
            "notice": RESEARCH_NOTICE,
            "scan": {"series": None, **case.facts},
            "report": None if report is None else records.report_of(report),
            "findings": records.findings_of(None if report is None else report.text, asked.probabilities),
            "answers": [
                {"question": question, **records.answer_of(answer)} for question, answer in zip(asked.questions, answers, strict=True)
            ],
            "masks": None,
            "warnings": list(case.warnings),
            "out_of_distribution": records.out_of_distribution_of(asked.out_of_distribution),
            "model": self.models.about,
            "versions": versions(),
        }
        if self.settings.masks:
            record["masks"] = self._masks(asked, record)
        write_json(self.journal.file(case.id), records.checked(record))

    def _masks(self, asked: _Asked, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Draw what report and answers point to, or with a segmenter the findings that the report states, and write the masks."""
        chat, case = self.models.chat, asked.case
        prompts: list[str | None] = [*([None] if self.settings.report else []), *asked.questions]
        drawn: list[tuple[str | None, Segmentation]] = []
        volume = None
        if self.models.segmenter is not None:
            names = [name.replace("_", " ") for name, found in record["findings"].items() if found["stated"] == "present"]
            if names:
                volume = open_volume(case)
                drawn = [(None, one) for one in self.models.segmenter.segment_all(volume, names, presence=PRESENCE_WHERE_STATED)]
        else:
            for prompt, answer in zip(prompts, asked.answers, strict=True):
                row, _ = chat.prompt(prompt or REPORT_PROMPTS[0], None, self.settings.max_new_tokens)
                if places := places_in(chat.model, chat.processor, row, [token.id for token in answer.tokens], asked.features):
                    volume = volume or open_volume(case)
                    drawn += [(prompt, one) for one in chat.masks(volume, places)]
        return self._saved(case.id, drawn)

    def _saved(self, id: str, drawn: Sequence[tuple[str | None, Segmentation]]) -> list[dict[str, Any]]:
        folder = self.journal.masks(id)
        folder.mkdir(parents=True, exist_ok=True)
        listed = []
        for number, (prompt, one) in enumerate(drawn, start=1):
            name = numbered_file(number, one.name)
            one.save_nifti(folder / name)
            facts = {key: _rounded(value) for key, value in one.facts.items()}
            listed.append({"file": f"{id}/{name}", "sentence": one.name, "question": prompt, "found": one.found, **facts})
        kept = {Path(mask["file"]).name for mask in listed}
        for file in folder.glob("*.nii.gz"):
            if file.name not in kept:
                file.unlink()
        return listed


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _finish(scans: Sequence[Scan], journal: Journal, settings: Settings, about: dict[str, Any]) -> Counts:
    """Write the tables of all cases, in the order of the scans."""
    out, lines = journal.out, [journal.lines[scan.id] for scan in scans]
    ids = [id for line in lines for id in line["cases"]]
    failures = [failure for line in lines for failure in line["failures"]]
    cut = 0
    with atomic_file(out / "results.jsonl") as aside, aside.open("w", encoding="utf-8", newline="") as file:
        for id in ids:
            record = journal.case(id)
            cut += records.is_cut(record)
            file.write(json_lines([record]))
    write_lines(out / "failures.jsonl", failures)
    records.write_table(out / "results.csv", map(journal.case, ids))
    written = ["results.jsonl", "results.csv", "failures.jsonl"]
    if settings.embed:
        vectors = [embedding_in(line, id) for line in lines for id in line["cases"]]
        records.write_embeddings(out / "embeddings.parquet", ids, vectors)
        written.append("embeddings.parquet")
    counts = Counts(len(ids), len(failures), cut)
    sums = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in written}
    manifest = {"notice": RESEARCH_NOTICE, "schema": records.SCHEMA, "models": about, "settings": vars(settings), "versions": versions()}
    write_json(out / "manifest.json", manifest | {"scans": len(scans), **vars(counts), "sha256": sums})
    return counts
