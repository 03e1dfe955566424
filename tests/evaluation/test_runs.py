"""Replacements of a scan in control evaluations, and the split that baselines learn from."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from med3dvlm.evaluation import empty_volume, other_patients, training_split
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.records import Study
from med3dvlm.volume import Volume


@pytest.mark.parametrize("recipe", ["m3d", "hu_window", "ct_rate", "ct_clip"])
def test_air_is_what_the_recipe_makes_of_air(recipe: str) -> None:
    processor = VolumeProcessor(recipe, size=(8, 12, 10))
    array = torch.full((40, 60, 50), -1000, dtype=torch.int16).numpy()
    array[15:25, 20:40, 15:35] = 40
    around = processor.transform(Volume(array, (3.0, 1.0, 1.0), "SPL", unit="HU"))
    empty = empty_volume(SimpleNamespace(processor=processor))
    assert empty.shape == (8, 12, 10) and empty.dtype == torch.float32
    assert (empty == {"m3d": 0, "hu_window": 0, "ct_rate": -1, "ct_clip": -1}[recipe]).all()
    assert float(around.min()) >= float(empty[0, 0, 0])


@pytest.mark.parametrize(
    ("splits", "evaluated", "found"),
    [
        (("test", "train", "validation"), "test", "train"),
        (("train_fixed", "valid_fixed"), "valid_fixed", "train_fixed"),
        (("test", "train"), "train", None),  # else a baseline would have seen its answers
        (("test",), "test", None),
    ],
)
def test_the_split_that_baselines_learn_from(splits: tuple[str, ...], evaluated: str, found: str | None) -> None:
    assert training_split(SimpleNamespace(summary={"splits": dict.fromkeys(splits, 1)}), evaluated) == found


def strangers_of(patients: str) -> list[int] | None:
    return other_patients([Study(f"s{place}", patient, "x", "", {}, "test", "hand") for place, patient in enumerate(patients)])


def test_other_patients_scans_are_a_permutation_where_one_exists() -> None:
    """All assignments of up to six studies to three patients are checked against all permutations."""
    for count in range(1, 7):
        for patients in itertools.product("abc", repeat=count):
            found = strangers_of("".join(patients))
            if len(set(patients)) == 1:
                assert found is None
                continue
            assert found is not None and all(patients[place] != own for place, own in zip(found, patients, strict=True))
            possible = any(
                all(patients[place] != own for place, own in zip(order, patients, strict=True))
                for order in itertools.permutations(range(count))
            )
            assert (sorted(found) == list(range(count))) == possible == (2 * max(Counter(patients).values()) <= count), patients


def test_other_patients_scans_by_hand() -> None:
    assert strangers_of("abcd") == [1, 2, 3, 0]
    assert strangers_of("aabcbc") == [2, 4, 3, 0, 5, 1]  # two on in the ring a a b b c c
    # Too few others: both are taken in turn, and they take the first of the one patient.
    assert strangers_of("aaaabc") == [4, 5, 4, 5, 0, 1]
