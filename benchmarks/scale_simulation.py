"""Simulate the loader of many nodes: the order of rows is the training's own; time, caches and network are simulated.

Each node has a cache of the volumes that were used last, and connections to a store, over which it fetches what the next rows of its
processes need, not further ahead than so many rows. A step begins when all nodes have its volumes, as gradients are exchanged in it.
"""

import heapq
import math
from collections import OrderedDict
from typing import Any

import numpy as np

from med3dvlm.training.trainer import WholeBatches

BATCH = 8  # volumes of a GPU's step


def rows_of_nodes(rows: int, nodes: int, gpus: int, epoch: int, own_shards: bool = False) -> np.ndarray[Any, Any]:
    """Return the rows of an epoch, (steps, nodes, gpus * BATCH), as the sampler shares them out: processes take turns with whole batches.

    Args:
        own_shards: what the training does not do: every node shuffles the same part of the rows in every epoch.
    """
    if own_shards:
        shards = [nodes * rows_of_nodes(rows // nodes, 1, gpus, epoch) + node for node in range(nodes)]
        return np.concatenate(shards, axis=1)
    sampler = WholeBatches(rows, nodes * gpus * BATCH, seed=0)
    sampler.set_epoch(epoch)
    return np.fromiter(sampler, np.int64, len(sampler)).reshape(-1, nodes, gpus * BATCH)


def transfer_seconds(inputs: dict[str, Any]) -> float:
    """Return the seconds in which a volume comes over one of a node's connections while all are busy."""
    assumed, size = inputs["assumed"], inputs["measured"]["prepared_bytes"]["m3d"]
    node = min(inputs["link_gbit_per_second"] / 8 * 1e9, inputs["store_gbyte_per_second"] * 1e9 / inputs["nodes"])
    connections = assumed["connections_per_process"] * inputs["gpus_per_node"]
    return float(size / min(assumed["connection_megabytes_per_second"] * 1e6, node / connections))


def fetch_seconds(inputs: dict[str, Any]) -> float:
    """Return the mean seconds of a fetch: waiting for the answer, which is log-normal, and the transfer."""
    assumed = inputs["assumed"]
    return float(assumed["latency_seconds"] * math.exp(assumed["latency_spread"] ** 2 / 2) + transfer_seconds(inputs))


def simulate(inputs: dict[str, Any], gpu_seconds: float, cache_share: float, ahead: int, own_shards: bool = False) -> dict[str, float]:
    """Simulate two epochs; returns {"seconds", "ideal", "fetched"} of the second: its time, that of the GPUs alone, and bytes fetched.

    Args:
        gpu_seconds: of a GPU for one volume.
        cache_share: of all data that a node's cache holds.
        ahead: rows that each process fetches before they are needed; 0 fetches a step's rows when it is to begin.
        own_shards: see `rows_of_nodes`.
    """
    nodes, gpus, scans, assumed = inputs["nodes"], inputs["gpus_per_node"], inputs["scans"], inputs["assumed"]
    size, connections = inputs["measured"]["prepared_bytes"]["m3d"], assumed["connections_per_process"] * gpus
    transfer = transfer_seconds(inputs)
    random = np.random.default_rng(0)
    held = [OrderedDict[int, None]() for _ in range(nodes)]
    free = [[0.0] * connections for _ in range(nodes)]  # when each connection is
    capacity, steps_ahead, step = int(cache_share * scans), ahead // BATCH, BATCH * gpu_seconds
    begun: list[float] = []  # when each step begins
    end, first_end, fetched = 0.0, 0.0, 0
    for epoch in (0, 1):
        first_end, fetched = end, 0
        for step_rows in rows_of_nodes(scans, nodes, gpus, epoch, own_shards):
            place = len(begun) - steps_ahead
            allowed = end if steps_ahead == 0 else begun[place] if place >= 0 else 0.0
            ready = end
            for node, wanted in enumerate(step_rows):
                missing = _missing(held[node], wanted.tolist(), capacity)
                fetched += missing
                waits = assumed["latency_seconds"] * np.exp(assumed["latency_spread"] * random.standard_normal(missing))
                for wait in waits.tolist():
                    done = max(heapq.heappop(free[node]), allowed) + wait + transfer
                    heapq.heappush(free[node], done)
                    ready = max(ready, done)
            begun.append(ready)
            end = ready + step
    steps = math.ceil(scans / (nodes * gpus * BATCH))
    return {"seconds": end - first_end, "ideal": steps * step, "fetched": float(fetched * size)}


def _missing(held: OrderedDict[int, None], wanted: list[int], capacity: int) -> int:
    """Look rows up in a node's cache, put them there, and return how many were not."""
    missing = 0
    for row in wanted:
        if row in held:
            held.move_to_end(row)
        else:
            missing += 1
            held[row] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return missing
