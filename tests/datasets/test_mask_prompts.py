"""Prompts about studies with masks: true of their voxels, drawn from seed and epoch alone, and none for unlabelled findings."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.mask_prompts import MaskCollator, MaskDataset, MaskPrompts, PromptedPairCollator, PromptedPairDataset
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset

SIZE = (4, 6, 8)


def box(*corner: int) -> Tensor:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[tuple(slice(start, start + 2) for start in corner)] = True
    return mask


def about(side: str = "", text: str = "", kind: str = "finding", place: str = "") -> SimpleNamespace:
    return SimpleNamespace(kind=kind, side=side, text=text, place=place)


@dataclass(frozen=True)
class Known:
    """A study as far as prompts go."""

    id: str
    masks: dict[str, Any]
    labels: dict[str, int] = field(default_factory=dict)


NODULE = "Lung nodule of 8 mm in the left lung."
STUDIES = [
    Known(
        "both",
        {"lung nodule": about("left", NODULE), "liver mass": about("right"), "left kidney": about("left", kind="structure")},
        {"renal_cyst": 0},
    ),
    Known("absent", {"renal cyst": about("both")}, {"lung_nodule": 0, "liver_mass": 1}),
    Known("unknown", {}),
]
VOXELS = {"lung nodule": box(0, 0, 0), "liver mass": box(2, 4, 6), "left kidney": box(2, 2, 2), "renal cyst": box(0, 4, 0)}


class Data:
    """Prepared data as far as prompts go."""

    processor = SimpleNamespace(size=SIZE)

    def mask_names(self, study: Known) -> list[str]:
        return list(study.masks)

    def masks(self, study: Known, names: Sequence[str]) -> Tensor:
        return torch.stack([VOXELS[name] for name in names])


def prompts(**settings: Any) -> MaskPrompts:
    return MaskPrompts(Data(), STUDIES, **settings)  # type: ignore[arg-type]


def test_each_prompt_has_the_mask_of_its_finding() -> None:
    true = {
        "lung nodule": "lung nodule", "left lung nodule": "lung nodule", NODULE: "lung nodule", "liver mass": "liver mass",
        "right liver mass": "liver mass", "left kidney": "left kidney",
    }  # fmt: skip
    untrue = {"right lung nodule", "left liver mass", "renal cyst"}
    seen: set[str] = set()
    for epoch in range(60):
        row = prompts().row(STUDIES[0], epoch, 0)  # type: ignore[arg-type]
        assert row["masks"].shape == (len(row["prompts"]), *SIZE) and len(row["prompts"]) <= 6
        assert len(set(row["prompts"])) == len(row["prompts"])
        for text, mask in zip(row["prompts"], row["masks"], strict=True):
            assert torch.equal(mask, VOXELS[true[text]] if text in true else torch.zeros(SIZE, dtype=torch.bool)), text
            assert text in true or text in untrue
        for side, other in (("left", "right"), ("right", "left")):
            for name in ("lung nodule", "liver mass"):  # whoever says a side says that it is not the other
                assert (f"{side} {name}" in row["prompts"]) <= (f"{other} {name}" in row["prompts"])
        seen |= set(row["prompts"])
    assert seen == true.keys() | untrue
    assert seen <= set(prompts().texts(STUDIES))  # type: ignore[arg-type]


def test_unlabelled_findings_are_never_prompted() -> None:
    """A finding with label 1 but no mask, or without a label, is prompted neither as present nor as absent."""
    drawn = prompts().draw(STUDIES[1], 0, 0)  # type: ignore[arg-type]
    assert {(prompt.text, prompt.mask) for prompt in drawn} == {("renal cyst", "renal cyst"), ("lung nodule", None)}
    assert prompts().draw(STUDIES[2], 0, 0) == []  # type: ignore[arg-type]
    assert [prompts().known(study) for study in STUDIES] == [True, True, False]  # type: ignore[arg-type]


def test_shares_and_counts_follow_the_settings() -> None:
    study: Any = STUDIES[0]
    drawn = [prompts(sentences=0.5, sides=0.25).draw(study, epoch, 7) for epoch in range(800)]
    said = [prompt.text for each in drawn for prompt in each if prompt.mask == "lung nodule"]
    assert said.count(NODULE) / 800 == pytest.approx(0.5, abs=0.06)
    assert said.count("left lung nodule") / 800 == pytest.approx(0.25, abs=0.05)
    assert all(len(prompts(count=2).draw(study, epoch, 7)) == 2 for epoch in range(9))
    assert not any(prompt.mask == "left kidney" for epoch in range(9) for prompt in prompts(structures=0).draw(study, epoch, 7))
    assert [prompts(seed=1).draw(study, 3, 7) for _ in range(2)] == [prompts(seed=1).draw(study, 3, 7)] * 2


def test_places_are_asked_for_where_others_have_another() -> None:
    """Whoever says a place also asks for another that the finding has elsewhere; a place that all have, or none, is not said."""
    lobes = ("right upper lobe", "left lower lobe", "left upper lobe")
    studies: list[Any] = [
        Known(lobe, {"lung nodule": about(place=lobe), "ascites": about(place="peritoneum"), "liver mass": about()}) for lobe in lobes
    ]
    drawing = MaskPrompts(Data(), studies, sentences=0.0, sides=0.0, places=0.5)  # type: ignore[arg-type]
    said, elsewhere = 0, []
    for epoch in range(800):
        drawn = {prompt.text: prompt.mask for prompt in drawing.draw(studies[0], epoch, 0)}
        assert drawn.keys() <= set(drawing.texts(studies))
        assert {"ascites": "ascites", "liver mass": "liver mass"}.items() <= drawn.items()
        assert drawn["lung nodule"] == "lung nodule"
        said += drawn.get("lung nodule, right upper lobe") == "lung nodule"
        elsewhere += [text for text, mask in drawn.items() if mask is None]
    assert said / 800 == pytest.approx(0.5, abs=0.06) and len(elsewhere) == said
    for lobe in lobes[1:]:
        assert elsewhere.count(f"lung nodule, {lobe}") / said == pytest.approx(0.5, abs=0.08)
    assert not any("," in text for text in MaskPrompts(Data(), studies).texts(studies))  # type: ignore[arg-type]


def test_a_mask_that_two_prompts_name_is_the_mask_of_both() -> None:
    studies: list[Any] = [
        Known(place, {"lung nodule": about(place=place), "left kidney": STUDIES[0].masks["left kidney"]}) for place in "ab"
    ]
    drawing = MaskPrompts(Data(), studies, sentences=0.0, sides=0.0, places=1.0)  # type: ignore[arg-type]
    row = drawing.row(studies[0], 0, 0)
    shown = dict(zip(row["prompts"], row["masks"], strict=True))
    assert set(shown) == {"left kidney", "lung nodule", "lung nodule, a", "lung nodule, b"}
    for text, name in (("left kidney", "left kidney"), ("lung nodule", "lung nodule"), ("lung nodule, a", "lung nodule")):
        assert torch.equal(shown[text], VOXELS[name])
    assert not shown["lung nodule, b"].any()


def test_rows_of_different_lengths_become_one_batch() -> None:
    drawn = prompts()
    rows = [drawn.row(study, 0, number) | {"volume": torch.zeros(1, *SIZE, dtype=torch.uint8)} for number, study in enumerate(STUDIES)]  # type: ignore[arg-type]
    collator = MaskCollator(lambda text: {"input_ids": torch.tensor([[len(one)] for one in text])})  # type: ignore[arg-type]
    batch = collator(rows)
    counts = batch["counts"].tolist()
    assert counts == [len(row["prompts"]) for row in rows] and counts[2] == 0
    assert batch["masks"].shape == (3, max(counts), *SIZE) and not batch["masks"][1, counts[1] :].any()
    assert batch["input_ids"].flatten().tolist() == [len(text) for row in rows for text in row["prompts"]]
    drawn.features = {text: torch.full((2,), float(len(text))) for text in drawn.texts(STUDIES)}  # type: ignore[arg-type]
    encoded = collator([drawn.row(study, 0, number) | {"volume": rows[0]["volume"]} for number, study in enumerate(STUDIES)])  # type: ignore[arg-type]
    assert encoded["text_features"][:, 0].tolist() == batch["input_ids"].flatten().tolist()


def test_masks_move_with_their_volumes() -> None:
    """The masks are boxes that are also bright in the volume."""
    augmentation = Augmentation(share=1.0, scale=0, shift=0, gamma=0, noise=0, flips=("width",))
    masks = torch.zeros(6, 2, 16, 20, 24, dtype=torch.bool)
    masks[:, 0, 4:9, 5:15, 3:9] = masks[:, 1, 8:12, 2:7, 14:20] = True
    keys = torch.tensor([[0, 1, row] for row in range(6)])
    moved = augmentation.move_masks(masks, keys)
    for number in range(2):
        volumes = augmentation(masks[:, number : number + 1].float(), keys, (0.0, 1.0))
        assert torch.equal(moved[:, number], volumes[:, 0] >= 0.5)
    assert not torch.equal(moved, masks)
    unmoved = Augmentation(share=0.0)
    assert torch.equal(unmoved.move_masks(masks, keys), masks)


def test_data_without_masks_is_refused(prepared: Path) -> None:
    data = PreparedData(prepared)
    data.mask_names = lambda study: []  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="have no masks"):
        MaskDataset(data, "train")
    with pytest.raises(ValueError, match="have no masks"):
        PromptedPairDataset(data, "train")


def test_image_report_pairs_are_unchanged(prepared: Path) -> None:
    data = PreparedData(prepared)
    plain, prompted = PairDataset(data, "train", sentences=2), PromptedPairDataset(data, "train", sentences=2)
    for number in range(3):
        row, other = plain[number], prompted[number]
        assert all(torch.equal(row[name], other[name]) if name == "volume" else row[name] == other[name] for name in row)
        assert other["masks"].any() and len(other["prompts"]) == len(other["masks"])
    batch = PromptedPairCollator(lambda text: {"input_ids": len(text)})([prompted[0], prompted[1]])  # type: ignore[arg-type]
    assert batch["input_ids"] == 4 and batch["prompts"]["input_ids"] == sum(batch["prompts"]["counts"])
