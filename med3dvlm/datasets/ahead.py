"""The order of rows of a training, and volumes of data at an address fetched before the loader comes to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Sampler

from med3dvlm.remote.ahead import FetchAhead

AHEAD = 128  # rows
SHARE = 0.5  # of the cache that may hold what was fetched ahead


@dataclass(frozen=True)
class OwnRows:
    """Which places of the order one process reads, where processes take turns with whole batches."""

    batch_size: int
    processes: int
    rank: int

    def __contains__(self, place: int) -> bool:
        return place // self.batch_size % self.processes == self.rank


class AheadSampler(Sampler[int]):
    """The rows of another sampler, in its order; the volumes of those that come next are being fetched meanwhile.

    Args:
        rows: a StudyDataset of data at an address.
        own: the places in the order that this process reads.
        ahead: how many own rows.
    """

    def __init__(self, sampler: Any, rows: Any, own: OwnRows, ahead: int) -> None:
        self.sampler, self.rows, self.own, self.ahead = sampler, rows, own, ahead
        self.fetching = FetchAhead(rows.data.remote)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)
        own = [row for place, row in enumerate(order) if place in self.own]
        before = self.fetching.queued  # of earlier epochs
        asked = passed = 0
        for place, row in enumerate(order):
            if place in self.own:
                if asked < len(own) and asked - passed <= self.ahead // 2:
                    coming = self.rows.needed(own[asked : passed + self.ahead])
                    self.fetching.want([(study.id, self.rows.data.sums(study)) for study in coming], before + passed)
                    asked += len(coming)
                passed += 1
            yield row


def fetched_ahead(sampler: Any, rows: Any, own: OwnRows, processes: int) -> Any:
    """Return the sampler, or for data at an address one that fetches volumes ahead.

    Args:
        processes: that share this machine's cache.
    """
    data = getattr(rows, "data", None)
    if data is None or data.remote is None or not rows.needed([0]):
        return sampler
    ahead = min(AHEAD, int(SHARE * data.remote.cache.size / processes / data.volume_size))
    return AheadSampler(sampler, rows, own, ahead) if ahead else sampler
