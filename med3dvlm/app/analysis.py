"""Overlays and neighbours of a scan: masks of findings, saliency of an answer or a phrase, and similar cases.

`Analysis` wraps the package's functions for the workstation; a function that lacks its model is None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from med3dvlm.inference.segmentation import Segmentation
from med3dvlm.volume import Volume

MAX_CELLS = 128  # of an overlay along an axis; the page draws smoothly between them
SIMILAR = 4
SEGMENTERS = ("segmenter", "segmentation")  # folders within or beside the model that may hold a segmenter

Cells = tuple[NDArray[np.float32], int]  # 0..1 at every step-th voxel of the volume along (D, H, W), from the first, and the step
Segment = Callable[[Volume, Sequence[str]], list[Segmentation]]


@dataclass(frozen=True)
class Case:
    """A case of an index. `picture` is (H, W) uint8, or None where its prepared volume is gone."""

    similarity: float
    report: str
    picture: NDArray[np.uint8] | None


@dataclass(frozen=True)
class Analysis:
    """Functions for one set of models: `explain(volume, question, answer, history)` and `find(volume, phrase)` return saliency,
    `similar(volume)` the nearest cases, `segment(volume, names)` a mask for each name on the volume's own grid. They raise ValueError where
    they cannot.
    """

    explain: Callable[[Volume, str, str, list[dict[str, str]]], Cells] | None = None
    find: Callable[[Volume, str], Cells] | None = None
    similar: Callable[[Volume], list[Case]] | None = None
    segment: Segment | None = None


def find_segmenter(model: Path) -> Path | None:
    """Return the folder of a segmenter within or beside a model's folder, or None."""
    folders = [place / name for place in (model, model.resolve().parent) for name in SEGMENTERS]
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def load(chat: Any, contrastive: Path | None, index: Path | None, segmenter: Path | None = None) -> Analysis:
    """Build the Analysis of a Med3DChat and the folders of a Med3DCLIP, of an index of cases and of a Med3DSegmenter. `contrastive` defaults
    to the model that made the index. With a segmenter, masks replace saliency overlays. Raises FileNotFoundError or ValueError where a folder
    is missing or holds another kind of model.
    """
    from med3dvlm.inference.saliency import PhraseSaliency, SaliencyMap, answer_saliency, place

    def placed(heat: SaliencyMap, volume: Volume, processor: Any) -> Cells:
        step = -(-max(volume.shape) // MAX_CELLS)
        return place(heat, volume, processor, step), step

    def explain(volume: Volume, question: str, answer: str, history: list[dict[str, str]]) -> Cells:
        return placed(answer_saliency(chat, volume, question, answer, history), volume, chat.processor.image_processor)

    cases = None
    if index is not None:
        from med3dvlm.search import CaseIndex

        cases = CaseIndex(index, contrastive)
        cases.embedder  # noqa: B018  loaded now, not at somebody's first question
        contrastive = cases.model
    finder = None if contrastive is None or segmenter is not None else PhraseSaliency.from_pretrained(contrastive)

    def find(volume: Volume, phrase: str) -> Cells:
        assert finder is not None
        return placed(finder.saliency(volume, phrase), volume, finder.processor.image_processor)

    def similar(volume: Volume) -> list[Case]:
        assert cases is not None
        return [Case(hit.similarity, hit.report, cases.picture(hit)) for hit in cases.search_scan(volume, SIMILAR)]

    if segmenter is not None:
        from med3dvlm.inference.segmentation import Segmenter

        return Analysis(similar=similar if cases else None, segment=Segmenter.from_pretrained(segmenter).segment_all)
    return Analysis(explain, find if finder else None, similar if cases else None)
