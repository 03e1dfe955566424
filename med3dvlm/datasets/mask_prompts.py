"""Text prompts about a prepared study, each with its mask: training data of a segmenter and of the dense loss of stage 1.

Positive prompts name what has a mask: by its name, with its side, by the report's sentence about it, or twice, without and with its place.
Negative prompts, with an empty mask, name findings whose label is 0, or put what lies at one side or place alone at another. What nobody looked for
is never asked for.

Shapes: B volumes of D, H, W voxels; K prompts a volume, N in all; L text tokens; C width of text features.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.streams import Purpose, stream
from med3dvlm.datasets.torch import PairCollator, PairDataset, StudyDataset, stack_images
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.records import Mask, Study
from med3dvlm.reports.findings import finding_of

OTHER_SIDE = {"left": "right", "right": "left"}


def absent_findings(study: Study, names: Iterable[str]) -> list[str]:
    """Return those findings (by their masks' names) that the study's labels say are absent."""
    return [name for name in names if name not in study.masks and study.labels.get(finding_of(name)) == 0]


class Prompt(NamedTuple):
    """A text, and the name of the study's mask of it; None where the text is not true."""

    text: str
    mask: str | None


class MaskPrompts:
    """Draws prompts about studies, in every epoch anew.

    Args:
        studies: whose findings are asked for.
        count: prompts a study at most.
        structures: how many of them name a structure that is there; the rest are its findings, then absent ones.
        sentences: share of findings asked for by the report's sentence, where there is one.
        sides: share of findings asked for with their side, where they lie on one; another prompt then names the other side.
        places: share of findings asked for by name and once more with their place, where others of the name have another; a third prompt then
            names one of those. For places that exclude each other, as lobes do: a lung and its lobe do not.
    """

    features: dict[str, Tensor] | None = None  # text -> (C), once they have been computed

    def __init__(
        self,
        data: PreparedData,
        studies: Sequence[Study],
        seed: int = 0,
        count: int = 6,
        structures: int = 1,
        sentences: float = 0.3,
        sides: float = 0.3,
        places: float = 0.0,
    ) -> None:
        self.data, self.seed, self.count, self.structures = data, seed, count, structures
        self.sentences, self.sides, self.places = sentences, sides, places
        found: dict[str, set[str]] = defaultdict(set)
        for study in studies:
            for name, mask in study.masks.items():
                if mask.kind == "finding":
                    found[name].add(mask.place)
        self.findings = sorted(found)
        self.known_places = {name: sorted(filter(None, found[name])) for name in self.findings}

    def known(self, study: Study) -> bool:
        """Return whether there is any prompt about the study."""
        return bool(self.data.mask_names(study) or absent_findings(study, self.findings))

    def texts(self, studies: Sequence[Study]) -> list[str]:
        """Return all prompts that these studies may get."""
        prompts = list(self.findings)
        if self.places:
            prompts += [f"{name}, {place}" for name, places in self.known_places.items() if len(places) > 1 for place in places]
        for study in studies:
            for name, mask in study.masks.items():
                prompts += [name, *(f"{side} {name}" for side in OTHER_SIDE if _side(name, mask)), *filter(None, [mask.text])]
        return list(dict.fromkeys(prompts))

    def draw(self, study: Study, epoch: int, row: int) -> list[Prompt]:
        """Draw at most `count` prompts of the study."""
        random = stream((self.seed, epoch, row), Purpose.PROMPTS)
        names = [str(name) for name in random.permutation(self.data.mask_names(study))]
        findings = [name for name in names if study.masks[name].kind == "finding"]
        structures = [name for name in names if study.masks[name].kind != "finding"]
        there: list[Prompt] = []
        missing = [Prompt(str(name), None) for name in random.permutation(absent_findings(study, self.findings))]
        for name in (*structures[: self.structures], *findings):
            mask, choice = study.masks[name], random.random()
            if mask.text and choice < self.sentences:
                there.append(Prompt(mask.text, name))
            elif (side := _side(name, mask)) and choice >= 1 - self.sides:
                there.append(Prompt(f"{side} {name}", name))
                missing.insert(0, Prompt(f"{OTHER_SIDE[side]} {name}", None))
            elif self.sentences <= choice < self.sentences + self.places and (others := self._elsewhere(name, mask)):
                there += [Prompt(name, name), Prompt(f"{name}, {mask.place}", name)]
                missing.insert(0, Prompt(f"{name}, {random.choice(others)}", None))
            else:
                there.append(Prompt(name, name))
        return [*there, *missing][: self.count]

    def _elsewhere(self, name: str, mask: Mask) -> list[str]:
        """Return the places where findings of that name lie in other studies; none where this one has no place in words."""
        return [place for place in self.known_places.get(name, ()) if place != mask.place] if mask.place else []

    def row(self, study: Study, epoch: int, row: int) -> dict[str, Any]:
        """Return "prompts" (texts), or "prompt_features" (K, C) where they have been computed, and "masks" (K, D, H, W) bool."""
        drawn = self.draw(study, epoch, row)
        names = list(dict.fromkeys(prompt.mask for prompt in drawn if prompt.mask is not None))
        masks = torch.zeros(len(drawn), *self.data.processor.size, dtype=torch.bool)
        for name, mask in zip(names, self.data.masks(study, names) if names else (), strict=True):
            masks[[number for number, prompt in enumerate(drawn) if prompt.mask == name]] = mask
        if self.features is None:
            return {"prompts": [prompt.text for prompt in drawn], "masks": masks}
        known = [self.features[prompt.text] for prompt in drawn]
        return {"prompt_features": torch.stack(known) if known else torch.zeros(0, *_one(self.features).shape), "masks": masks}


def _side(name: str, mask: Mask) -> str:
    """Return left or right where a finding lies on one side and its name does not say so; else nothing."""
    needless = mask.kind != "finding" or mask.side not in OTHER_SIDE or not OTHER_SIDE.keys().isdisjoint(name.lower().split())
    return "" if needless else mask.side


def _one(features: dict[str, Tensor]) -> Tensor:
    return next(iter(features.values()))


def collate_prompts(rows: Sequence[dict[str, Any]], processor: Med3DCLIPProcessor) -> dict[str, Tensor]:
    """Collate the prompts of rows for a Med3DSegmenter: `text_features` (N, C), or `input_ids` and `attention_mask` (N, L); `counts` (B),
    `masks`.
    """
    masks = pad_sequence([row["masks"] for row in rows], batch_first=True)
    batch = {"counts": torch.tensor([len(row["masks"]) for row in rows]), "masks": masks}  # (B, K, D, H, W)
    if "prompt_features" in rows[0]:
        return batch | {"text_features": torch.cat([row["prompt_features"] for row in rows])}
    texts = [text for row in rows for text in row["prompts"]]
    none = torch.zeros(0, 1, dtype=torch.long)
    return batch | (dict(processor(text=texts)) if texts else {"input_ids": none, "attention_mask": none})


def require_masks(data: PreparedData, split: str, studies: Sequence[Study]) -> None:
    """Raise ValueError where no study of the split has a mask."""
    if not any(data.mask_names(study) for study in studies):
        raise ValueError(f"the studies of split {split!r} in {data.root} have no masks; prepare data that has some")


class MaskDataset(StudyDataset):
    """Every study of a split that has prompts, with its volume and the prompts of `MaskPrompts.row`.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, data: PreparedData, split: str, seed: int = 0, augmentation: Augmentation | None = None, **settings: Any) -> None:
        super().__init__(data, split, seed, augmentation)
        self.prompts = MaskPrompts(data, self.studies, seed, **settings)
        self.studies = [study for study in self.studies if self.prompts.known(study)]
        require_masks(data, split, self.studies)

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.studies[index]
        return self.image(study, index) | self.prompts.row(study, self.epoch, index)


class MaskCollator:
    """Rows of a MaskDataset -> the arguments of Med3DSegmenter.forward, as `collate_prompts`."""

    def __init__(self, processor: Med3DCLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**stack_images(rows), **collate_prompts(rows, self.processor)}


class PromptedPairDataset(PairDataset):
    """A PairDataset whose rows have the prompts of `MaskPrompts.row` too, none where nothing can be said about a study.

    Args:
        drawn: settings of MaskPrompts.

    Raises:
        ValueError: no study has a mask.
    """

    def __init__(self, data: PreparedData, split: str, seed: int = 0, drawn: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(data, split, seed, **settings)
        self.prompts = MaskPrompts(data, self.studies, seed, **drawn or {})
        require_masks(data, split, self.studies)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | self.prompts.row(self.studies[index], self.epoch, index)


class PromptedPairCollator(PairCollator):
    """Rows of a PromptedPairDataset -> what PairCollator makes of them, and "prompts" as `collate_prompts`."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(rows), "prompts": collate_prompts(rows, self.processor)}
