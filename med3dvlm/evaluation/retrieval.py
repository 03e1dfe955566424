"""Evaluate retrieval by a Med3DCLIP: which report belongs to a volume, and which volume to a report.

    med3dvlm evaluate retrieval --model outputs/demo/stage1 --data outputs/demo/prepared --output outputs/demo/eval/retrieval
    med3dvlm evaluate retrieval --data outputs/demo/prepared --output outputs/demo/eval/retrieval --score-only --pools 50,100 --ks 5,10,50,100

Every study is embedded once, to embeddings.safetensors. A pool is the first 100, 500, 1000 or 2000 studies of the split, as far as it has
that many, or all of a smaller split. predictions.jsonl has the rank of each one's partner among the whole split, from 1; a tie counts
against the partner. An interval is a 95 % bootstrap over patients, who are drawn as queries: the pool stays as it is.

    any_of_equal   the same where the report of another study counts as right if it has the same words, or its volume the same voxels
    shuffled       the same with another patient's volume in the place of each, each volume once
    chance         what is expected of a random order
    image_to_image where studies have labels, volumes found by a volume of another patient: mean average precision by a shared finding, and
                   the share of findings in common that CT-CLIP gives by that name (med3dvlm/metrics/shared_findings.py)
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from med3dvlm import evaluation
from med3dvlm.datasets.duplicates import equal_groups, groups, words
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation.image_to_image import image_to_image_scores, image_to_image_table
from med3dvlm.files import atomic_file, write_lines
from med3dvlm.metrics.intervals import intervals, mean_of, median_of
from med3dvlm.metrics.retrieval import rank_values, retrieval_ranks, retrieval_scores
from med3dvlm.programs import positive
from med3dvlm.records import Study

POOLS = (100, 500, 1000, 2000)
KS = (1, 5, 10, 50)
WAYS = ("image_to_text", "text_to_image")


def numbers(text: str) -> list[int]:
    """Parse "100,500" to [100, 500], for argparse."""
    return sorted({positive(part.strip()) for part in text.split(",")})


def first_equals(data: PreparedData, studies: Sequence[Study]) -> tuple[list[int], list[int]]:
    """Return for each study the index of the first with the same scan, and of the first with the same report."""
    places: tuple[dict[str, int], dict[str, int]] = {}, {}
    scans = [places[0].setdefault(data.checksum(study), place) for place, study in enumerate(studies)]
    return scans, [places[1].setdefault(study.report, place) for place, study in enumerate(studies)]


def encoded(embeddings: torch.Tensor) -> list[str]:
    """Encode each row of (B, P) as base64 of its little-endian float32: a quarter of the size in decimals."""
    return [base64.b64encode(row.tobytes()).decode() for row in embeddings.numpy().astype("<f4")]


def decoded(lines: Sequence[str]) -> torch.Tensor:
    """Decode the strings of `encoded` to (N, P)."""
    rows = [np.frombuffer(base64.b64decode(line, validate=True), "<f4") for line in lines]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def equal_studies(data: PreparedData, studies: Sequence[Study]) -> list[int]:
    """Return equal numbers for studies with the same report or the same scan, directly or through others."""
    same = [*equal_groups(" ".join(words(study.report)) for study in studies), *equal_groups(map(data.checksum, studies))]
    return groups(len(studies), [(group[0], other) for group in same for other in group[1:]])


def score(
    images: torch.Tensor, texts: torch.Tensor, pool: int, studies: Sequence[Study], alike: Sequence[int], ks: Sequence[int] = KS
) -> dict[str, Any]:
    """Return the figures of one pool. `images` and `texts` (N, P) are of the whole split; `alike` has equal numbers for equal studies."""
    scores = retrieval_scores(images, texts, ks, pool, alike)
    for forgiving, entry in ((None, scores), (alike, scores["any_of_equal"])):
        for way, ranks in retrieval_ranks(images, texts, pool, forgiving).items():
            statistics = {name: mean_of(values) for name, values in rank_values(ranks, ks).items()}
            spans = intervals(statistics | {"median_rank": median_of(ranks)}, [study.patient for study in studies[:pool]])
            entry[way]["intervals"] = spans
    if others := evaluation.other_patients(studies):
        scores["shuffled"] = {way: retrieval_scores(images[others], texts, ks, pool)[way] for way in WAYS}
    harmonic = float((1 / np.arange(1, pool + 1)).mean())
    scores["chance"] = {f"r{k}": min(k / pool, 1.0) for k in ks} | {"median_rank": (pool + 1) / 2, "mrr": harmonic}
    if found := image_to_image_scores(images[:pool], studies[:pool], ks):
        scores["image_to_image"] = found
    return scores


def table(scores: dict[str, Any], ks: Sequence[int] = KS) -> str:
    """Return a line a pool, direction and way of counting."""
    names = [*(f"r{k}" for k in ks), "median_rank", "mrr"]
    rows = []
    for entry in scores.values():
        for way in WAYS:
            parts = {
                "": entry,
                "any of equal": entry["any_of_equal"],
                "shuffled": entry.get("shuffled", {}),
                "chance": {way: entry["chance"]},
            }
            if not entry["any_of_equal"]["duplicated"]:
                del parts["any of equal"]
            for part, figures in parts.items():
                if cells := figures.get(way):
                    spans = cells.get("intervals", {})
                    rows.append(
                        [entry["pool"], way.replace("_", " "), part, *(evaluation.with_interval(cells[n], spans.get(n)) for n in names)]
                    )
    header = ("pool", "direction", "counted", *(f"R@{k}" for k in ks), "median rank", "MRR")
    last = list(scores.values())[-1]
    equal_ones = f"{last['any_of_equal']['duplicated']} of {last['pool']} studies have an equal one."
    return "\n\n".join(filter(None, [evaluation.markdown_table(header, rows), equal_ones, image_to_image_table(scores, ks)]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--max-text-length", type=positive, help="tokens of a report (default: what the text encoder takes)")
    parser.add_argument("--pools", type=numbers, help="sizes of pools, as 100,500 (default: those of the papers that the split fills)")
    parser.add_argument(
        "--ks", type=numbers, default=list(KS), help="k of recall@k and of image to image, as 5,10,50,100 (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    data, studies = evaluation.open_data(arguments)
    pools = arguments.pools or [pool for pool in POOLS if pool <= len(studies)] or [len(studies)]
    if pools[-1] > len(studies):
        raise ValueError(f"--pools asks for {pools[-1]} studies, but there are {len(studies)} to rank")
    if missing := [study.id for study in studies if not study.report.strip()]:
        raise ValueError(f"{len(missing)} studies have no report, the first is {missing[0]}; leave them out with --split-file")
    predicted, embedded = arguments.output / "predictions.jsonl", arguments.output / "embeddings.safetensors"
    growing = arguments.output / "embeddings.jsonl"  # line by line, so that a killed run continues

    def about(study: Study) -> dict[str, Any]:
        return {"id": study.id}

    if not arguments.score_only:
        embedder = evaluation.load_embedder(arguments.model, data, arguments.device, arguments.max_text_length)
        evaluation.begin(arguments, embedder.model, data, max_text_length=embedder.processor.max_text_length)

        def embed(batch: Sequence[Study]) -> list[dict[str, Any]]:
            images, texts = (
                encoded(evaluation.embed_volumes(embedder, data, batch)),
                encoded(embedder.texts([study.report for study in batch])),
            )
            return [about(study) | {"image": image, "text": text} for study, image, text in zip(batch, images, texts, strict=True)]

        batches = evaluation.in_batches(studies, arguments.batch_size)
        there = embedded.is_file()
        if not (evaluation.is_first() if there else evaluation.predict(growing, batches, embed, about)):
            return
        if not there:
            rows = evaluation.predictions(growing, list(map(about, studies)), lambda row: ["image", "text"])
            with atomic_file(embedded) as aside:
                made = {name: decoded([row[name] for row in rows]) for name in ("image", "text")}
                # Equal reports and scans have to tie, but batches of other shapes differ in the last bits.
                save_file(
                    {name: values[firsts] for (name, values), firsts in zip(made.items(), first_equals(data, studies), strict=True)}, aside
                )
        growing.unlink(missing_ok=True)
        stored = load_file(embedded)
        ranks = retrieval_ranks(stored["image"], stored["text"])
        columns = zip(studies, *(ranks[way].tolist() for way in WAYS), strict=True)
        write_lines(predicted, [about(study) | dict(zip(WAYS, places, strict=True)) for study, *places in columns])

    evaluation.predictions(predicted, [about(study) for study in studies])  # makes sure that they are about these studies
    if not embedded.is_file():
        raise FileNotFoundError(f"{embedded} is missing; run the same command without --score-only")
    stored = load_file(embedded)  # (N, P) each
    if len(stored["image"]) != len(studies):
        raise ValueError(f"{embedded} holds {len(stored['image'])} studies, not {len(studies)}; delete it or choose another --output")
    alike = equal_studies(data, studies)
    scores = {f"pool_{pool}": score(stored["image"], stored["text"], pool, studies, alike, arguments.ks) for pool in pools}
    evaluation.write_scores(arguments.output / "scores.json", scores, table(scores, arguments.ks))
    print(table(scores, arguments.ks))
