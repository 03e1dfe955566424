"""Keys and values of a running batch, whose rows come and go, and of prefixes kept for reuse.

Shapes: B rows; Q new tokens a row; C places; H heads of keys and values; d their width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache

STEP = 128  # places are added by so many


class SlotCache(Cache):
    """A cache in which row r keeps its token p at place p of slot r; the slots in use are the first ones. `at` tells, before the language
    model runs, which slots its rows use and where their new tokens go.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.slots = self.places = 0
        self._kept: list[list[Tensor]] = []  # of each layer the keys and the values (slots, H, places + 1, d)
        self._rows, self._width = slice(0, 0), 0
        self._numbers = self._positions = torch.empty(0, 0, dtype=torch.long)  # (B, 1) slots, (B, Q) places of the new tokens

    def reserve(self, slots: int, places: int) -> None:
        """Make room for at least so many slots and places."""
        slots, places = max(self.slots, slots), max(self.places, -(-places // STEP) * STEP)
        if (slots, places) == (self.slots, self.places):
            return
        slots = max(slots, min(2 * self.slots, slots + 8)) if slots > self.slots else slots
        for layer in self._kept:
            for part, old in enumerate(layer):
                layer[part] = _like(old, slots, places)
                layer[part][: self.slots, :, : self.places] = old[:, :, : self.places]
        self.slots, self.places = slots, places

    def at(self, first: int, positions: Tensor, real: Tensor) -> int:
        """Set the rows to slots first, first + 1, ..., and their new tokens to `positions` (B, Q) where `real` (B, Q). Returns how many
        places the rows have.
        """
        self._rows, self._width = slice(first, first + len(positions)), int(positions.max()) + 1
        self._numbers = torch.arange(self._rows.start, self._rows.stop, device=positions.device)[:, None]
        self._positions = positions.masked_fill(~real, self.places)  # the last place, which nobody reads
        return self._width

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, Q, d) and return them with the earlier ones (B, H, width, d)."""
        if layer_idx == len(self._kept):
            self._kept.append([_like(new, self.slots, self.places) for new in (key_states, value_states)])
        for kept, new in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            kept[self._numbers, :, self._positions] = new.transpose(1, 2).to(kept.dtype)
        keys, values = (kept[self._rows, :, : self._width] for kept in self._kept[layer_idx])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._width

    def move(self, source: int, target: int) -> None:
        """Copy one slot over another."""
        for layer in self._kept:
            for kept in layer:
                kept[target] = kept[source]

    def copied(self, slot: int, length: int) -> list[list[Tensor]]:
        """Return a copy of the keys and values (H, length, d) of each layer."""
        return [[kept[slot, :, :length].clone() for kept in layer] for layer in self._kept]

    def fill(self, slot: int, layers: Sequence[Sequence[Tensor]], length: int) -> None:
        """Begin a slot with the first `length` tokens of `copied`."""
        if not self._kept:
            self._kept = [[_like(part[None], self.slots, self.places) for part in layer] for layer in layers]
        for kept, given in zip(self._kept, layers, strict=True):
            for into, part in zip(kept, given, strict=True):
                into[slot, :, :length] = part[:, :length]


def _like(states: Tensor, slots: int, places: int) -> Tensor:
    """Return zeros, since masked places are still multiplied by 0."""
    _, heads, _, width = states.shape
    return states.new_zeros(slots, heads, places + 1, width)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens about a scan whose keys and values are kept. `scan` refers to the encoder's output; the same tensor means the same scan."""

    scan: "ref[Tensor]"
    ids: NDArray[np.int64]
    layers: list[list[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)

    def shared(self, ids: NDArray[np.int64]) -> int:
        """Return how many of the first tokens are the same."""
        length = min(len(ids), len(self.ids))
        differ = np.flatnonzero(ids[:length] != self.ids[:length])
        return int(differ[0]) if len(differ) else length


class Prefixes:
    """The most recently used prefixes, within a limit of bytes, each no longer than anybody holds the encoder's output of its scan."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._kept: OrderedDict[int, Prefix] = OrderedDict()
        self._numbers = count()
        self._lock = RLock()  # scans are let go in any thread

    def find(self, scan: Tensor, ids: NDArray[np.int64]) -> tuple[Prefix | None, int]:
        """Return the prefix that shares most tokens with these, and how many."""
        with self._lock:
            found = [(prefix.shared(ids), number) for number, prefix in list(self._kept.items()) if prefix.scan() is scan]
            if not found:
                return None, 0
            shared, number = max(found)
            self._kept.move_to_end(number)
            return self._kept[number], shared

    def add(self, scan: Tensor, ids: NDArray[np.int64], layers: list[list[Tensor]]) -> None:
        """Keep a prefix and drop those that it continues, unless a kept one continues it."""
        if self.find(scan, ids)[1] == len(ids):
            return
        number, holder = next(self._numbers), ref(self)

        def let_go(_: object) -> None:
            if (prefixes := holder()) is not None:
                prefixes._drop(number)

        prefix = Prefix(ref(scan, let_go), ids, layers)
        with self._lock:
            for known_number, known in list(self._kept.items()):
                if known.scan() is scan and known.shared(ids) == len(known.ids):
                    self._drop(known_number)
            self._kept[number] = prefix
            self.nbytes += prefix.nbytes
            while self.nbytes > self.max_bytes:
                self._drop(next(iter(self._kept)))

    def _drop(self, number: int) -> None:
        with self._lock:
            if (prefix := self._kept.pop(number, None)) is not None:
                self.nbytes -= prefix.nbytes
