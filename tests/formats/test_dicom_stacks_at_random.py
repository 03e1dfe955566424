"""Stacks of random DICOM slices, without files."""

from pathlib import Path

import numpy as np
import pytest

from med3dvlm.formats.dicom_slices import Slice
from med3dvlm.formats.dicom_stacks import stacks_of


def drawn(stack: int, place: float, number: int, **attributes: object) -> Slice:
    attributes = {name: f"{value:06}" if isinstance(value, int) else str(value) for name, value in attributes.items()}
    where = {"position": (0.0, 0.0, place), "orientation": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), "spacing": (0.7, 0.7)}
    return Slice(Path(str(stack)), ("patient", "study", "series"), "", "CT", (9, 9), (), number=number, attributes=attributes, **where)


def found(slices: list[Slice], random: np.random.Generator) -> list[list[Slice]]:
    groups, _ = stacks_of([slices[index] for index in random.permutation(len(slices))])
    return [stack for stacks in groups for stack in stacks]


@pytest.mark.parametrize("seed", range(100))
def test_sound_stacks_stay_whole(seed: int) -> None:
    """Even stacks, slabs, and stacks with missing slices have attributes that differ by block, in some slices, in each, or at random."""
    random = np.random.default_rng(seed)
    count, step = random.integers(5, 60), random.choice([0.6, 1, 2.5, 5])
    places = np.cumsum(np.where((np.arange(count) > count // 2) & (seed % 3 == 0), 1.75 * step, step))
    places = places[random.random(count) > 0.1 * (seed % 2)]
    count = len(places)
    numbers = [np.arange(count), -np.arange(count), random.permutation(count)][seed % 3]

    def attribute() -> np.ndarray:
        block, some = random.integers(1, 9), random.choice(count, 3)
        indices = np.arange(count)
        choices = [0 * indices, indices // block, np.isin(indices, some), indices, indices < 2, random.random(count) < 0.5]
        return choices[random.integers(len(choices))].astype(int)

    names = ("acquisition", "type", "time", "thickness", "voltage", "delay", "contrast")
    attributes = {name: attribute() for name in names}
    slices = [drawn(0, places[k], int(numbers[k]), **{name: int(values[k]) for name, values in attributes.items()}) for k in range(count)]
    assert len(found(slices, random)) == 1


@pytest.mark.parametrize("seed", range(100))
def test_interleaved_stacks_are_separated(seed: int) -> None:
    """Two to four stacks, equally long or not, shifted or not, differ in an attribute or only in their order."""
    random = np.random.default_rng(seed)
    count, step, stacks = int(random.integers(5, 60)), random.choice([0.6, 1, 2.5, 5]), int(random.integers(2, 5))
    offset, name = (
        step * random.choice([0, 0, 0.003, 0.01, 0.1, 0.3, 0.5, 0.77]),
        ["acquisition", "kernel", "contrast", "time", ""][seed % 5],
    )
    other = max(5, count - int(random.integers(0, 2)) * int(random.integers(1, 4)))
    slices: list[Slice] = []
    for stack in range(stacks):
        for index in range(other if stack else count):
            attributes = {"time": 0, "acquisition": 0, "noise": random.random()} | ({name: stack} if name else {})
            slices.append(drawn(stack, index * step + stack * offset, index if name else len(slices), **attributes))
    parts = found(slices, random)
    assert sorted(len(part) for part in parts) == sorted([count, *[other] * (stacks - 1)])
    assert all(len({each.path for each in part}) == 1 for part in parts)
