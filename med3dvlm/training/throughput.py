"""Training speed: volumes and tokens a second, and the share of time that steps waited for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Throughput:
    """Counts what a process has trained on since the last figures, without time in `paused`: evaluations and checkpoints."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.started = time.perf_counter()
        self.waited = self.idle = 0.0
        self.volumes, self.tokens = 0, torch.tensor(0)  # tokens are added up where the batches are: no step waits for the number

    def timed(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches and count them; the time until each arrives counts as waiting for data."""
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            volumes, tokens = count(batch)
            self.volumes, self.tokens = self.volumes + volumes, tokens + self.tokens
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            self.idle += time.perf_counter() - before

    def totals(self) -> Tensor:
        """Return (4) float64: volumes, tokens, seconds, seconds of waiting since the last call."""
        seconds = time.perf_counter() - self.started - self.idle
        totals = torch.tensor([self.volumes, int(self.tokens), seconds, self.waited], dtype=torch.float64)
        self._begin()
        return totals


def count(batch: dict[str, Any]) -> tuple[int, Tensor | int]:
    """Return the volumes of a batch, or features in their place, and its tokens without padding."""
    images = batch.get("pixel_values", (batch.get("image_features") or [()])[0])
    mask: Any = batch.get("attention_mask", 0)
    if isinstance(mask, Tensor):  # (B, L), or (B, 1, L, L) with positions, of which what fills up has 0, as a row's first token
        mask = mask.sum() if mask.ndim < 4 else (batch["position_ids"] > 0).sum() + len(mask)
    return len(images), mask


def figures(totals: Tensor, processes: int) -> dict[str, float]:
    """Convert sums of `totals` over all processes to the entries of a log line."""
    volumes, tokens, seconds, waited = totals.tolist()
    rates = {"volumes_per_second": volumes, "tokens_per_second": tokens}
    speed = {name: round(number * processes / seconds, 3) for name, number in rates.items() if number}
    return speed | {"data_wait": round(waited / seconds, 4)}
