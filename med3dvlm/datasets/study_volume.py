"""Prepare the volume of one study, and say what it was made from."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from med3dvlm.datasets.masks import pack, read_masks
from med3dvlm.datasets.outputs import Line, Volumes
from med3dvlm.datasets.sources import Scans, states
from med3dvlm.datasets.statistics import BINS
from med3dvlm.datasets.store import read_stored_masks, read_voxels
from med3dvlm.files import checksum
from med3dvlm.formats import VERSION
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.records import Study
from med3dvlm.remote.cache import FULL, CacheFullError
from med3dvlm.remote.files import Listed
from med3dvlm.remote.store import volume_name
from med3dvlm.volume import Volume, read_volume


def files_of(study: Study) -> tuple[str, ...]:
    """Return the names of a scan and of its masks' files."""
    return (study.image, *sorted({mask.file for mask in study.masks.values()}))


def stamp_of(settings: str, study: Study) -> Line:
    """Return a digest of how a volume is made: scan, what the data set says of it, settings, the readers' version."""
    reading = json.loads(json.dumps(study.reading))
    stamp = {"study": study.id, "image": study.image, "reading": reading, "settings": settings, "readers": VERSION}
    places = {name: [mask.file, mask.channel, mask.value] for name, mask in study.masks.items()}
    return stamp | {"drawn": places} if places else stamp


def is_whole(volumes: Volumes, size: Sequence[int], study: Study, line: Line) -> bool:
    try:
        with volumes.here(volume_name(study.id)) as path:
            read_voxels(path, line["checksum"])
            for name in line.get("masks", {}):
                read_stored_masks(path, size, line["masks"], [name])
    except ValueError:
        return False
    return True


def prepare_on_any_machine(
    scans: Scans, volumes: Volumes, processor: VolumeProcessor, settings: str, study: Study, files: Mapping[str, Listed]
) -> tuple[Line | None, str | None]:
    """Fetch a scan's files where needed and prepare it by `prepare_one`; raises FileNotFoundError on a machine that does not see the folders."""
    scans.require()
    volumes.require()
    with ExitStack() as stack:
        try:
            root, state = stack.enter_context(scans.here(files))
        except OSError as error:
            if isinstance(error, CacheFullError) or error.errno in FULL:
                raise
            return None, str(error)
        line, reason = prepare_one(root, volumes, processor, settings, study, state)
    return line, None if reason is None else reason.replace(str(root), scans.name)


def prepare_one(
    source: Path, volumes: Volumes, processor: VolumeProcessor, settings: str, study: Study, untouched: str | None = None
) -> tuple[Line | None, str | None]:
    """Prepare one volume. Returns its line of the index, or the failure.

    Args:
        untouched: the state of the scan's files at an address, where they come from one.
    """
    scan = source / study.image
    try:
        stamp = stamp_of(settings, study)
        if all((source / file).exists() for file in files_of(study)):  # before they are read
            stamp |= {"files": states(source, files_of(study), contents=True), "untouched": untouched or states(source, files_of(study))}
        volume = read_volume(scan, **study.reading)
        regular = volume.straighten() if processor.straighten else volume
        values, placement = processor.transform_and_placement(regular)
        voxels = processor.quantize(values)[0].contiguous()
        masks, packed, doubts = _masks(source, study, volume, processor, placement)
    except (OSError, ValueError) as error:  # VolumeError is a ValueError
        return None, str(error)
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError; anything else is a defect and stops the run
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        return None, f"{scan}: there is too little memory for this scan; prepare with fewer workers or on a larger machine"
    line = stamp | {"checksum": checksum(voxels.numpy())} | _found(volume, voxels, processor) | masks
    if regular.spacing is not None:  # mm of the prepared voxels
        line["grid_spacing"] = [round(float(mm), 4) for mm in np.array(regular.spacing) @ np.abs(placement[:3, :3])]
    line["warnings"] += doubts
    volumes.write(volume_name(study.id), save({"voxels": voxels, **packed}, {"line": json.dumps(line)}))
    return line, None


def _masks(
    source: Path, study: Study, volume: Volume, processor: VolumeProcessor, placement: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[Line, dict[str, torch.Tensor], list[str]]:
    """Return the index's facts about the study's masks, their bits by their names in the file, and warnings."""
    stored: Line = {}
    contents: dict[str, torch.Tensor] = {}
    doubts: list[str] = []
    empty: list[str] = []
    lost: list[str] = []
    for name, drawn, assumed in read_masks(source, study.masks, volume, study.reading.get("transpose", False)):
        straight = volume.straightening().apply(drawn.astype(np.float32)) >= 0.5 if processor.straighten and not volume.regular else drawn
        made = pack(processor.transform_mask(straight, placement))
        stored[name] = {"voxels": made.voxels, "box": made.box, "place": len(contents), "checksum": checksum(made.content)}
        if made.voxels:
            contents[f"mask {len(contents)}"] = torch.frombuffer(bytearray(made.content), dtype=torch.uint8)
        else:
            (lost if drawn.any() else empty).append(name)
        doubts += assumed
    for names, what in ((empty, "some masks hold no voxel of the scan"), (lost, "some masks are lost by cropping and resizing")):
        if names:
            doubts.append(f"{what} ({len(names)}: {', '.join(names)}).")
    return {"masks": {name: stored[name] for name in study.masks}} if stored else {}, contents, list(dict.fromkeys(doubts))


def _found(volume: Volume, voxels: torch.Tensor, processor: VolumeProcessor) -> Line:
    """Return the facts that the summary counts. The histogram is of every second voxel along each axis, in parts per 10,000."""
    sample = voxels[::2, ::2, ::2].numpy()
    counts, _ = np.histogram(sample, BINS, (processor.grid.low, processor.grid.high))
    return {
        "shape": list(volume.shape),
        "spacing": None if volume.spacing is None else [round(mm, 4) for mm in volume.spacing],
        "orientation": volume.orientation,
        "unit": volume.unit,
        "warnings": list(volume.warnings),
        "histogram": np.rint(counts * 1e4 / sample.size).astype(int).tolist(),
    }
