"""Evaluate the masks of a Med3DSegmenter against those of the data, finding by finding.

    med3dvlm evaluate segmentation --model outputs/demo/stage1/segmenter --data outputs/demo/prepared --output outputs/demo/eval/segmentation
    med3dvlm evaluate segmentation --data outputs/demo/prepared --output outputs/demo/eval/segmentation --score-only

A case is a finding of a study: one that has a mask, or that its labels say is absent. All are asked by their names, together, on the prepared
volume. A mask is drawn where the probability of the finding being there at all exceeds --presence; its voxels are those whose probability exceeds
--threshold.

    dice         twice the voxels in common by all of both; 0 for a finding that is there and not drawn
    nsd          share of both surfaces that lie within --tolerance mm of the other (normalised surface distance)
    hd95         95th percentile of the Hausdorff distance in mm, of the findings that were drawn
    pointing     whether the highest voxel lies in the finding
    f1           of components: one that is drawn counts as one of the data's from an intersection over union of 0.1 on
    absent       share of absent findings for which a mask is drawn, and share of the studies in which any is
    calibration  of the presence score, over present and absent findings
    operating_points  dice and absent for other scores of presence from which a finding is drawn

Millimetres are those of the prepared voxels; where a spacing is unknown, a voxel counts as 1 mm and scores.json counts such studies. Figures
are given for all findings and for those whose longest diameter is 8 mm or more. Controls that do not see the scan, or do not read the words:

    middle         the voxel in the middle of the volume
    mean_mask      of the training studies' masks of this finding the mean; what reaches half of its highest is drawn
    other_patient  the mask of this finding in another patient of the same split
    one_mask       the union of all that was drawn in the study, whatever was asked for
    chance         of pointing: the share of the volume that the finding fills

An interval is a 95 % bootstrap over patients.
"""

import argparse
import base64
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from med3dvlm import evaluation
from med3dvlm.datasets.mask_prompts import absent_findings
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.evaluation.segmentation_scores import Row, scores_of, table
from med3dvlm.geometry.measurements import VoxelPositions, longest_diameter_mm
from med3dvlm.inference.segmentation import PRESENCE, THRESHOLD, Segmenter
from med3dvlm.metrics.segmentation import component_counts, dice, surface_scores
from med3dvlm.records import Study

MAX_TRAINING = 400  # studies that the mean mask is made of
Mask = NDArray[np.bool_]


class Task(NamedTuple):
    """A study, with the names of its findings that have a mask and of those that are absent."""

    study: Study
    present: list[str]
    absent: list[str]


def tasks_of(data: PreparedData, studies: Sequence[Study]) -> list[Task]:
    """Return the studies with a case. A finding of which no study has a mask is not asked for."""
    drawn = {study.id: [name for name in data.mask_names(study) if study.masks[name].kind == "finding"] for study in studies}
    names = sorted({name for found in drawn.values() for name in found})
    tasks = [Task(study, drawn[study.id], absent_findings(study, names)) for study in studies]
    return [task for task in tasks if task.present or task.absent]


def mean_masks(data: PreparedData, split: str | None, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return for each finding the share of the training studies' masks that hold a voxel (D, H, W); of at most `MAX_TRAINING` studies."""
    sums: dict[str, NDArray[np.float32]] = {}
    counts: dict[str, int] = defaultdict(int)
    for study in data.studies(split)[:MAX_TRAINING] if split else ():
        found = [name for name in data.mask_names(study) if name in names]
        for name, mask in zip(found, data.masks(study, found).numpy() if found else (), strict=True):
            sums[name] = sums.get(name, np.zeros(mask.shape, np.float32)) + mask
            counts[name] += 1
    return {name: total / np.float32(counts[name]) for name, total in sums.items()}


def others_of(tasks: Sequence[Task]) -> dict[tuple[str, str], Study]:
    """Return for a study's id and a finding the next study of another patient with a mask of it, in a ring; none where there is none."""
    having: dict[str, list[Study]] = defaultdict(list)
    for task in tasks:
        for name in task.present:
            having[name].append(task.study)
    found = {}
    for name, studies in having.items():
        for place, study in enumerate(studies):
            ring = [other for other in studies[place + 1 :] + studies[:place] if other.patient != study.patient]
            if ring:
                found[study.id, name] = ring[0]
    return found


def highest(values: NDArray[Any]) -> tuple[int, ...]:
    return tuple(int(place) for place in np.unravel_index(int(values.argmax()), values.shape))


def judged(drawn: Mask, point: tuple[int, ...], true: Mask) -> dict[str, float]:
    """Return the two figures of a control."""
    return {"dice": dice(drawn, true), "pointing": float(true[point])}


def packed(plane: Mask) -> str:
    """Encode a mask in a slice (H, W) as text."""
    return base64.b64encode(zlib.compress(np.packbits(plane).tobytes())).decode()


def unpacked(text: str, shape: Sequence[int]) -> Mask:
    """Decode the text of `packed`."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)


class Judge:
    """Scores the masks of a study and the controls."""

    def __init__(
        self, data: PreparedData, tasks: Sequence[Task], split: str | None, threshold: float, presence: float, tolerance: float
    ) -> None:
        self.data, self.threshold, self.presence, self.tolerance = data, threshold, presence, tolerance
        self.means = mean_masks(data, split, sorted({name for task in tasks for name in task.present}))
        self.others = others_of(tasks)

    def rows(self, task: Task, likely: NDArray[np.float32], presence: NDArray[np.float32]) -> list[Row]:
        """Return a record for each finding of the study, the present first.

        Args:
            likely: (K, D, H, W), the probability of each voxel.
            presence: (K,), that of the finding being there.
        """
        names = task.present + task.absent
        above = likely > self.threshold
        drawn = above & (presence > self.presence)[:, None, None, None]
        union: Mask = np.asarray(drawn.any(axis=0))
        together = highest(likely.max(axis=0))
        spacing = self.data.spacing(task.study)
        rows = []
        for place, name in enumerate(names):
            row: Row = {"finding": name, "present": place < len(task.present), "presence": round(float(presence[place]), 6)}
            row["voxels"] = int(drawn[place].sum())
            row["at_any_presence"] = {"voxels": int(above[place].sum())}
            if row["present"]:
                true = self.data.masks(task.study, [name])[0].numpy()
                row |= self._present(drawn[place], highest(likely[place]), true, spacing)
                row["at_any_presence"]["dice"] = dice(above[place], true)
                row["middle"] = {"pointing": float(true[tuple(length // 2 for length in true.shape)])}
                row["one_mask"] = judged(union, together, true)
                row |= self._without_scan(task.study, name, true)
            else:
                row["components"] = component_counts(drawn[place], np.zeros_like(drawn[place]))
            rows.append(row)
        return rows

    def _present(self, drawn: Mask, point: tuple[int, ...], true: Mask, spacing: tuple[float, float, float] | None) -> Row:
        steps = spacing or (1.0, 1.0, 1.0)
        near, far = surface_scores(drawn, true, steps, self.tolerance)
        positions = VoxelPositions(np.zeros(3), np.diag(steps), np.arange(len(true), dtype=np.float64))
        largest = int(true.sum(axis=(1, 2)).argmax())
        return judged(drawn, point, true) | {
            "slice": largest,
            "drawn_slice": packed(drawn[largest]),
            "nsd": near,
            "hd95": None if np.isnan(far) else far,
            "components": component_counts(drawn, true),
            "mm": round(longest_diameter_mm(true, positions), 3),
            "spacing": spacing is not None,
            "chance": {"pointing": float(true.mean())},
        }

    def _without_scan(self, study: Study, name: str, true: Mask) -> Row:
        found: Row = {}
        if (mean := self.means.get(name)) is not None:
            found["mean_mask"] = judged(np.asarray(mean >= mean.max() / 2), highest(mean), true)
        if (other := self.others.get((study.id, name))) is not None:
            mask = self.data.masks(other, [name])[0].numpy()
            voxels = np.argwhere(mask)
            nearest = voxels[int(np.linalg.norm(voxels - voxels.mean(axis=0), axis=1).argmin())]
            found["other_patient"] = judged(mask, tuple(nearest.tolist()), true)
        return found


def predicted(task: Task, data: PreparedData, segmenter: Segmenter, judge: Judge) -> Row:
    """Return a study's line of predictions.jsonl."""
    pixels = data.processor.dequantize(data.volume(task.study))[None]  # (1, 1, D, H, W)
    names = task.present + task.absent
    likely, presence = segmenter.probabilities(pixels, names)
    return about(task) | {"findings": judge.rows(task, likely.cpu().numpy(), presence.cpu().numpy())}


def about(task: Task) -> Row:
    return {"id": task.study.id, "asked": task.present + task.absent}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="probability from which a voxel counts (default: %(default)s)")
    parser.add_argument(
        "--presence",
        type=float,
        default=PRESENCE,
        help="probability of a finding being there above which it is drawn (default: %(default)s)",
    )
    parser.add_argument("--tolerance", type=float, default=2.0, help="tolerance of the surface distance in mm (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__ or "", batch_size=1)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    settings = {name: getattr(arguments, name) for name in ("threshold", "presence", "tolerance")}
    data, studies = evaluation.open_data(arguments, **settings)
    tasks = tasks_of(data, studies)
    if not any(task.present for task in tasks):
        raise ValueError(f"no study of split {arguments.split!r} in {arguments.data} has a mask of a finding; prepare data that has masks")
    file = arguments.output / "predictions.jsonl"
    if not arguments.score_only:
        segmenter = Segmenter.from_pretrained(arguments.model, arguments.device)
        same_preprocessing(segmenter.processor.image_processor, data)
        evaluation.begin(arguments, segmenter.model, data, **settings)
        judge = Judge(data, tasks, evaluation.training_split(data, arguments.split), **settings)

        def answer(batch: Sequence[Task]) -> list[Row]:
            return [predicted(task, data, segmenter, judge) for task in batch]

        with torch.no_grad():
            if not evaluation.predict(file, evaluation.in_batches(tasks, arguments.batch_size), answer, about):
                return
    scores = scores_of(evaluation.predictions(file, [about(task) for task in tasks]), [task.study.patient for task in tasks])
    evaluation.write_scores(arguments.output / "scores.json", scores, table(scores))
    print(table(scores))
