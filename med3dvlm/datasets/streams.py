"""Random numbers for training, a stream for each purpose: what one draws is independent of what another does for the same row."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """The purpose of random numbers. The values are in recorded trainings: do not change them."""

    AUGMENTATION = 1
    REPORT_ROWS = 2
    PROMPTS = 3


def stream(key: int | Sequence[int], purpose: Purpose | None = None) -> np.random.Generator:
    """Return the generator of a key of whole numbers, for example (seed, epoch, row), and a purpose; the words of a row have none."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=() if purpose is None else (int(purpose),)))
