"""Evaluate saliency maps against the true places of lesions, which are known for phantoms.

    med3dvlm evaluate saliency --model outputs/demo/model --clip outputs/demo/stage1 --data outputs/demo/prepared \\
        --scans outputs/demo/phantoms --output outputs/demo/eval/grounding
    med3dvlm evaluate saliency --data outputs/demo/prepared --output outputs/demo/eval/grounding --score-only

A case is a finding of a study. Its heat (med3dvlm.inference.saliency) has one highest cell, of which is asked whether it holds a part of the lesion
(inside), whether it or a cell that touches it does (near), and how far its middle lies from the lesion (mm).

    phrase          the contrastive model's heat for the finding's name
    answer          the assistant's for saying that name when asked what abnormality is seen
    other phrase,   the same for a finding of that region which the study does not have: how much of a hit is the map's habit
    other answer
    middle          always the cell in the middle of the volume, without a look at it
    chance          what is expected of a cell drawn at random, computed for each case from its own lesion

Where cells are few and lesions large, chance is high, and organs lie where they lie: read a figure beside its chance and the middle's. An
interval is a 95 % bootstrap over patients; scores.json has that of the gain, figure minus chance, too.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, distance_transform_edt

from med3dvlm import evaluation
from med3dvlm.checkpoints import model_type
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.phantom import Plan, draw_with_masks, read_plans
from med3dvlm.datasets.phantom.wording import KINDS, kinds_of
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.inference.chat import Med3DChat
from med3dvlm.inference.saliency import PhraseSaliency, SaliencyMap, answer_saliency
from med3dvlm.metrics.intervals import intervals, mean_of
from med3dvlm.records import Study
from med3dvlm.volume import Volume, read_volume

QUESTION = "What abnormality is seen?"
FIGURES = ("inside", "near", "mm")
Find = Callable[[Any, str], SaliencyMap]  # of a scan and a finding's name


class Case(NamedTuple):
    """One finding of a study."""

    study: Study
    finding: str


def by_phrase(finder: PhraseSaliency, scan: Any, name: str) -> SaliencyMap:
    return finder.saliency(scan, f"{name.capitalize()}.")


def by_answer(chat: Med3DChat, scan: Any, name: str) -> SaliencyMap:
    return answer_saliency(chat, scan, QUESTION, name.capitalize())


def finders(arguments: argparse.Namespace, data: PreparedData) -> tuple[dict[str, Find], list[Any]]:
    """Return a saliency function for each model that was named, and the models."""
    found: dict[str, Find] = {}
    models = []
    for path in filter(None, (arguments.model, arguments.clip)):
        kind = model_type(path)
        if kind == "med3d_clip":
            finder = PhraseSaliency.from_pretrained(path, arguments.device)
            found["phrase"] = partial(by_phrase, finder)
            models.append((finder.model, finder.processor.image_processor))
        elif kind == "med3dvlm":
            chat = Med3DChat.from_pretrained(path, arguments.device)
            found["answer"] = partial(by_answer, chat)
            models.append((chat.model, chat.processor.image_processor))
        else:
            raise ValueError(f"{path} holds a {kind} model, which has no saliency; name the output of stage 1, stage 3 or `med3dvlm merge`")
    for _, processor in models:
        same_preprocessing(processor, data)
    return found, [model for model, _ in models]


def judge(heat: SaliencyMap, mask: NDArray[np.bool_], volume: Volume, placement: NDArray[np.float64]) -> dict[str, Any]:
    """Score the highest cell, and a random one.

    Args:
        mask: (D, H, W), the lesion in the scan's voxels.
        placement: of the model's voxels in the scan.
    """
    to_scan = placement @ heat.cells  # cell -> voxel of the scan
    grid = heat.values.shape
    voxels = np.argwhere(mask)
    cells = np.rint((np.c_[voxels, np.ones(len(voxels))] @ np.linalg.inv(to_scan).T)[:, :3]).astype(int)
    lesion = np.zeros(grid, bool)
    lesion[tuple(np.clip(cells, 0, np.array(grid) - 1).T)] = True
    around = binary_dilation(lesion, np.ones((3, 3, 3)))
    middles = np.stack([*np.indices(grid), np.ones(grid)], axis=-1) @ to_scan.T  # (d, h, w, 4)
    nearest = np.clip(np.rint(middles[..., :3]), 0, np.array(mask.shape) - 1).astype(int)
    millimetres = distance_transform_edt(~mask, sampling=volume.spacing)[tuple(np.moveaxis(nearest, -1, 0))]
    maps = {"inside": lesion, "near": around, "mm": millimetres}
    figures = {name: float(values[heat.peak]) for name, values in maps.items()}
    return {"peak": heat.peak, "grid": grid, **figures, "chance": {name: float(values.mean()) for name, values in maps.items()}}


def look(case: Case, plan: Plan, data: PreparedData, scans: Path, ways: dict[str, Find]) -> dict[str, Any]:
    """Return a case's record."""
    volume = read_volume(scans / case.study.image)
    placement = data.processor.placement(volume)
    mask = draw_with_masks(plan.body, plan.acquisition)[1][case.finding]
    if mask.shape != volume.shape or not mask.any():
        raise ValueError(f"{scans / case.study.image} is not the scan that the plan of {scans} describes; write the phantoms anew")
    present = {finding.kind for finding in plan.body.findings}
    kinds = kinds_of(plan.body.region)
    start = kinds.index(case.finding)
    other = next(kind for kind in kinds[start:] + kinds[:start] if kind not in present)
    pixels = data.processor.dequantize(data.volume(case.study))  # (1, D, H, W)
    record: dict[str, Any] = {"lesion_voxels": int(mask.sum()), "other": other}
    for name, way in ways.items():
        for row, kind in ((name, case.finding), (f"other {name}", other)):
            heat = way(pixels, KINDS[kind]["name"])
            record[row] = judge(heat, mask, volume, placement)
    return record | {"middle": judge(middle(heat), mask, volume, placement)}


def middle(heat: SaliencyMap) -> SaliencyMap:
    """Return a heat map on the same grid that is the higher the nearer to the middle of the volume."""
    cells = np.stack([*np.indices(heat.values.shape), np.ones(heat.values.shape)], axis=-1) @ heat.cells.T  # (d, h, w, 4), in voxels
    away = np.linalg.norm(cells[..., :3] - (np.array(heat.size) - 1) / 2, axis=-1)
    return replace(heat, values=-away.astype(np.float32))


def summary(rows: Sequence[dict[str, Any]], patients: Sequence[str]) -> dict[str, Any]:
    """Return the figures of every method over some cases."""
    scores: dict[str, Any] = {"cases": len(rows)}
    for name in [name for name in rows[0] if isinstance(rows[0][name], dict)]:
        found = np.array([[row[name][figure] for figure in FIGURES] for row in rows])  # (N, 3)
        chance = np.array([[row[name]["chance"][figure] for figure in FIGURES] for row in rows])
        spans = intervals({"found": mean_of(found), "gain": mean_of(found - chance)}, patients)
        scores[name] = {
            figure: {
                "value": float(found[:, place].mean()),
                "interval": spans["found"][place],
                "chance": float(chance[:, place].mean()),
                "gain_interval": spans["gain"][place],
            }
            for place, figure in enumerate(FIGURES)
        } | {"median_mm": float(np.median(found[:, 2]))}
    return scores


def table(scores: dict[str, Any]) -> str:
    """Return all findings with intervals, then a line a finding and method."""
    ways = [name for name, entry in scores["all"].items() if isinstance(entry, dict)]

    def cells(entry: dict[str, Any], spans: bool) -> list[Any]:
        parts: list[Any] = []
        for figure in FIGURES:
            value, places = entry[figure], 1 if figure == "mm" else 3
            span = f" ({value['interval'][0]:.{places}f} to {value['interval'][1]:.{places}f})" if spans else ""
            parts += [f"{value['value']:.{places}f}{span}", f"{value['chance']:.{places}f}"]
        return parts

    header = ("inside", "chance", "near", "chance", "mm", "chance")
    whole = evaluation.markdown_table(("looked by", *header), [[way, *cells(scores["all"][way], True)] for way in ways])
    lines = [
        [kind, entry["cases"], way, *cells(entry[way], False)]
        for kind, entry in scores["findings"].items()
        for way in ways
        if not way.startswith(("other", "middle"))
    ]
    return (
        f"{scores['all']['cases']} findings.\n\n{whole}\n\n{evaluation.markdown_table(('finding', 'cases', 'looked by', *header), lines)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--clip", help="directory of a Med3DCLIP, as stage 1 wrote it, besides the assistant or in its place as --model")
    parser.add_argument("--scans", type=Path, help="folder of the phantoms that the data was prepared from; not needed with --score-only")
    arguments = parser.parse_args(argv)
    data, studies = evaluation.open_data(arguments)
    predicted = arguments.output / "predictions.jsonl"
    cases = [Case(study, kind) for study in studies for kind in KINDS if study.labels.get(kind)]
    if not cases:
        raise ValueError(f"no study of split {arguments.split!r} in {arguments.data} has a finding that phantoms have")

    def about(case: Case) -> dict[str, Any]:
        return {"id": case.study.id, "finding": case.finding}

    if not arguments.score_only:
        if arguments.scans is None:
            raise ValueError("--scans is missing; name the folder of the phantoms that the data was prepared from")
        plans = {plan.study.id: plan for plan in read_plans(arguments.scans)}
        if strange := [study.id for study in studies if study.id not in plans or plans[study.id].study.report != study.report]:
            raise ValueError(f"{strange[0]} in {arguments.data} is not one of the phantoms in {arguments.scans}; name theirs by --scans")
        ways, models = finders(arguments, data)
        evaluation.begin(arguments, models[0], data, clip=[fingerprint(model) for model in models[1:]], question=QUESTION)

        def answer(batch: Sequence[Case]) -> list[dict[str, Any]]:
            return [about(case) | look(case, plans[case.study.id], data, arguments.scans, ways) for case in batch]

        if not evaluation.predict(predicted, evaluation.in_batches(cases, 1), answer, about):
            return

    rows = evaluation.predictions(predicted, [about(case) for case in cases])
    patients = [case.study.patient for case in cases]
    scores: dict[str, Any] = {"all": summary(rows, patients), "findings": {}}
    for kind in KINDS:
        chosen = [place for place, case in enumerate(cases) if case.finding == kind]
        if chosen:
            scores["findings"][kind] = summary([rows[place] for place in chosen], [patients[place] for place in chosen])
    evaluation.write_scores(arguments.output / "scores.json", scores, table(scores))
    print(table(scores))
