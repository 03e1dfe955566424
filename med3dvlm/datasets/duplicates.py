"""Find duplicate studies: volumes that differ by noise, intensity, a shift or a crop only, and reports that differ by a few words.

Volumes. Each is read once and leaves a checksum and a thumbnail of 16 x 32 x 32 grey values. Equal checksums are exact duplicates. The
candidates for near ones are every volume's NEIGHBOURS by the correlation of 8 x 8 x 8 block means. Scans of one region look alike, so
what counts is their texture: one thumbnail is laid over the other, stretched and shifted along its axes and brought to its brightness by
least squares, and pairs that then correlate at LOOKS_ALIKE are read again at 32 x 64 x 64, aligned further, and compared in what is two
to three voxels wide (a box mean of 3 less one of 7). That correlation is the pair's similarity.

Reports. Their words in pairs make a set; how alike two are is the Jaccard index of their sets. MinHash (datasketch) finds candidates. A
report joins the group whose first report is most alike, if that is at least SAME_REPORT, or begins a group of its own: common phrases
("within normal limits") make thousands of reports alike, and comparing each with each would never end.

Measured on 600 demo phantoms, 40 of them altered before their preparation by recipe m3d (whose window and crop follow the extremes, so that
noise and crops move much). Of 300 pairs of nearest scans of other patients none reaches SAME_VOLUME (the highest is 0.974). Compared with
its original, a copy of other gamma is found always, with noise of 30 HU or shifted by a voxel 9 times in 10, with 3 % cut off all round
6 in 10; one of another window never. The original is among the ten candidates always, 8, 9.5 and 5 times in 10: phantoms of one region and
plane differ less than people do.

Cost for 120,000 studies: volumes are read once (1 TB of 128 x 256 x 256; what is done is kept), 2 GB of memory for the thumbnails,
15 TFLOP for the neighbours in blocks of 250 MB, at most 1.2 million coarse alignments of 13 ms, and 0.1 s for each pair that looks
alike, on one core; some minutes for the reports.

Shapes: N studies, P pairs, thumbnails (N, d, h, w).
"""

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, affine_grid, avg_pool3d, grid_sample, normalize, pad
from tqdm import tqdm

from med3dvlm.datasets.store import Opening, PreparedData
from med3dvlm.files import atomic_file, checksum
from med3dvlm.records import Study

DESCRIPTOR, THUMBNAIL, DETAIL = (8, 8, 8), (16, 32, 32), (32, 64, 64)
BLOCK = 1024  # studies: what is lost when the reading is interrupted
NEIGHBOURS = 10
LOOKS_ALIKE = 0.93
SAME_VOLUME = 0.975
SAME_REPORT = 0.6
PERMUTATIONS = 128

_opened: PreparedData  # this and the next two: in a worker process, which a fork gives them without a copy
_studies: Sequence[Study]
_pictures: Tensor


class Pair(NamedTuple):
    """Two places in a list of studies, the first before the second, and how alike they are (1: the same)."""

    first: int
    second: int
    similarity: float


def thumbnails(data: PreparedData, studies: Sequence[Study], folder: Path, workers: int) -> tuple[Tensor, list[str]]:
    """Return thumbnails (N, d, h, w) uint8 and checksums of all volumes. They are kept in `folder` by blocks, so that an interrupted run
    continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = []
    with (
        ProcessPoolExecutor(workers, initializer=_open, initargs=(data.opening,)) as pool,
        tqdm(total=len(studies), desc="reading volumes", unit="volume") as progress,
    ):
        for start in range(0, len(studies), BLOCK):
            block = studies[start : start + BLOCK]
            path = folder / f"{data.summary['fingerprint']}-{start:07d}.npz"
            if not path.is_file():
                rows = []
                for row in pool.map(_thumbnail, block, chunksize=8):
                    rows.append(row)
                    progress.update()
                pictures, sums = zip(*rows, strict=True)
                with atomic_file(path) as aside, aside.open("wb") as file:  # to a name np.savez would add .npz
                    np.savez(file, thumbnails=np.stack(pictures), checksums=np.array(sums))
            else:
                progress.update(len(block))
            with np.load(path) as kept:
                blocks.append((kept["thumbnails"], kept["checksums"]))
    pictures, sums = zip(*blocks, strict=True)
    return torch.from_numpy(np.concatenate(pictures)), np.concatenate(sums).tolist()


def _open(opening: Opening, studies: Sequence[Study] = (), pictures: Tensor | None = None) -> None:
    global _opened, _studies, _pictures
    torch.set_num_threads(1)
    _opened, _studies = opening.reopen(), studies
    if pictures is not None:
        _pictures = pictures


def _thumbnail(study: Study) -> tuple[NDArray[np.uint8], str]:
    volume = _opened.volume(study)
    return _reduced(_opened, volume, THUMBNAIL).round().to(torch.uint8).numpy(), checksum(volume.numpy())


def _reduced(data: PreparedData, volume: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return block means (d, h, w) of a stored volume (1, D, H, W), from 0 to 255."""
    grid = data.processor.grid
    return (adaptive_avg_pool3d(volume.float(), size)[0] - grid.low) * (255 / (grid.high - grid.low))


def equal_groups(values: Iterable[Hashable]) -> list[list[int]]:
    """Return the indices of values that occur more than once, one list a value."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, value in enumerate(values):
        places[value].append(place)
    return [group for group in places.values() if len(group) > 1]


def similar_volumes(data: PreparedData, studies: Sequence[Study], pictures: Tensor, workers: int) -> list[Pair]:
    """Return the pairs of distinct volumes that are at least as similar as SAME_VOLUME; `pictures` are their thumbnails (N, d, h, w) uint8."""
    described = torch.cat([_standard(adaptive_avg_pool3d(part.float(), DESCRIPTOR)) for part in pictures.split(BLOCK)])  # (N, 512)
    candidates: set[tuple[int, int]] = set()
    for start in tqdm(range(0, len(described), BLOCK // 2), desc="comparing volumes", unit="block"):
        alike = described[start : start + BLOCK // 2] @ described.T
        places = torch.arange(start, start + len(alike))
        alike[torch.arange(len(alike)), places] = -2  # itself
        nearest = alike.topk(min(NEIGHBOURS, len(described) - 1), dim=1).indices
        for first, row in zip(places.tolist(), nearest.tolist(), strict=True):
            candidates.update((min(first, second), max(first, second)) for second in row)
    pairs = sorted(candidates)
    batches = [pairs[start : start + 16] for start in range(0, len(pairs), 16)]
    found = []
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(data.opening, studies, pictures)) as pool:
        compared = tqdm(pool.map(_compare, batches), total=len(batches), desc="aligning volumes", unit="batch")
        for batch, similarities in zip(batches, compared, strict=True):
            found += [Pair(*pair, value) for pair, value in zip(batch, similarities, strict=True) if value >= SAME_VOLUME]
    return found


def _compare(pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Return the similarity of each pair to four decimals, 0 where the thumbnails do not look alike."""
    fixed, moving = (torch.stack([_pictures[place] for place in places]).float() for places in zip(*pairs, strict=True))
    correlations, moves = align(fixed, moving, torch.zeros(len(pairs), 2, 3), steps=6)
    similarities = [0.0] * len(pairs)
    for row in (correlations >= LOOKS_ALIKE).nonzero().flatten().tolist():
        one, other = (_reduced(_opened, _opened.volume(_studies[place]), DETAIL)[None] for place in pairs[row])
        similarities[row] = round(float(same_texture(one, other, moves[row : row + 1])), 4)
    return similarities


def same_texture(fixed: Tensor, moving: Tensor, moves: Tensor) -> Tensor:
    """Return the correlation (P,) of details two to three voxels wide, away from the border, of volumes that `moves` aligns coarsely."""
    _, moves = align(fixed, moving, moves, steps=2)
    fine = _band(fixed)
    _, moves = align(fine, _band(moving), moves, steps=3)
    inner = (slice(None), *(slice(length // 10, length - length // 10) for length in fixed.shape[1:]))
    return (_standard(fine[inner]) * _standard(_band(_warp(moving, moves))[inner])).sum(1)


def align(fixed: Tensor, moving: Tensor, moves: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Align `moving` with `fixed` by stretches and shifts along the axes (Gauss-Newton). Returns the best correlation (P,) and the moves.

    In each step, fixed = gain * warped + gradient(warped) . (stretch * position + shift) + bias is solved by least squares; up to 20 %
    of an axis are followed.

    Args:
        fixed, moving: (P, d, h, w).
        moves: (P, 2, 3), from where: stretch and shift along (d, h, w), which go from -1 to 1.
    """
    count, *shape = fixed.shape
    positions = torch.meshgrid(*(torch.linspace(-1, 1, length) for length in shape), indexing="ij")
    stride = math.prod(shape) // math.prod(THUMBNAIL) | 1  # as many voxels as a thumbnail has are enough for eight unknowns
    target = fixed.flatten(1)[:, ::stride]
    best, chosen = torch.full((count,), -1.0), moves
    for _ in range(steps):
        warped = _warp(moving, moves)
        correlation = (_standard(fixed) * _standard(warped)).sum(1)
        chosen = torch.where((correlation > best)[:, None, None], moves, chosen)
        best = torch.maximum(best, correlation)
        slopes = [slope * ((length - 1) / 2) for slope, length in zip(torch.gradient(warped, dim=(1, 2, 3)), shape, strict=True)]
        columns = [slope * position for slope, position in zip(slopes, positions, strict=True)] + slopes + [warped, torch.ones_like(warped)]
        design = torch.stack([column.flatten(1)[:, ::stride] for column in columns], dim=2)  # (P, some voxels, 8)
        normal = design.mT @ design
        damping = torch.diag_embed(1e-4 * normal.diagonal(dim1=1, dim2=2) + 1e-6)
        solution = torch.linalg.solve(normal + damping, design.mT @ target[:, :, None])[:, :, 0]
        moves = (moves + (solution[:, :6] / solution[:, 6:7].clamp_min(0.3)).reshape(count, 2, 3)).clamp(-0.2, 0.2)
    return best, chosen


def _warp(moving: Tensor, moves: Tensor) -> Tensor:
    count, *shape = moving.shape
    matrix = torch.cat([torch.diag_embed(1 + moves[:, 0].flip(1)), moves[:, 1].flip(1)[:, :, None]], dim=2)  # torch counts (w, h, d)
    grid = affine_grid(matrix, [count, 1, *shape], align_corners=True)
    return grid_sample(moving[:, None], grid, padding_mode="border", align_corners=True)[:, 0]


def _band(volumes: Tensor) -> Tensor:
    """Filter by a band-pass: a box mean of 3 voxels minus one of 7."""
    return _box(volumes, 1) - _box(volumes, 3)


def _box(volumes: Tensor, edge: int) -> Tensor:
    wide = 2 * edge + 1
    means = pad(volumes[:, None], (edge,) * 6, mode="replicate")
    for kernel in ((wide, 1, 1), (1, wide, 1), (1, 1, wide)):
        means = avg_pool3d(means, kernel, stride=1)
    return means[:, 0]


def _standard(values: Tensor) -> Tensor:
    """Standardise (N, ...) to (N, all) with mean 0 and length 1; a constant becomes zeros."""
    flat = values.flatten(1)
    return normalize(flat - flat.mean(dim=1, keepdim=True), dim=1)


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:\.\d+)?", text.lower())


def similar_reports(reports: Sequence[str], threshold: float = SAME_REPORT) -> list[Pair]:
    """Pair each report that is not the first of its group with the first; earlier reports begin groups before later ones."""
    from datasketch import MinHash, MinHashLSH

    firsts = MinHashLSH(threshold=threshold - 0.1, num_perm=PERMUTATIONS)  # below, so that few at the threshold are missed
    pairs: dict[int, frozenset[str]] = {}
    found = []
    for place, report in enumerate(tqdm(reports, desc="comparing reports", unit="report")):
        tokens = words(report)
        if not tokens:
            continue
        phrases = frozenset(map(" ".join, zip(tokens, tokens[1:], strict=False))) or frozenset(tokens)
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([phrase.encode() for phrase in sorted(phrases)])
        alike = [(len(phrases & pairs[other]) / len(phrases | pairs[other]), -other) for other in firsts.query(sketch)]
        similarity, first = max(alike, default=(0.0, 0))
        if similarity >= threshold:
            found.append(Pair(-first, place, round(similarity, 4)))
        else:
            firsts.insert(place, sketch)
            pairs[place] = phrases
    return found


def groups(size: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Return for each of `size` indices the smallest index that pairs connect it with, itself where there is none."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.array([*pairs], dtype=np.int64).reshape(-1, 2)
    _, group = connected_components(coo_array((np.ones(len(ends)), ends.T), shape=(size, size)), directed=False)
    _, smallest = np.unique(group, return_index=True)
    return smallest[group].tolist()
