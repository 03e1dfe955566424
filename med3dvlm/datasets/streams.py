"""Random numbers for training, a stream for each purpose: what one draws is independent of what another does for the same row."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers are for. The values are in recorded trainings: do not change them."""

    AUGMENTATION = 1
    REPORT_ROWS = 2
    PROMPTS = 3


def stream(key: int | Sequence[int], purpose: Purpose | None = None) -> np.random.Generator:
    """The generator of a key of whole numbers, (seed, epoch, row) say, and a purpose; the words of a row have none."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=() if purpose is None else (int(purpose),)))
