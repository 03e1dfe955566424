"""M3D-Seg on disk <-> records.

    M3D_Seg/0000/0000.json        {"labels": {"0": "background", "1": "liver", ...}, "train": [{"image": path, "label": path}, ...],
                                  "test": [...]}; ours beside the paths: "about", what is known of the masks that a scan has, by name
    M3D_Seg/0000/<case>/image.npy (1, x, y, z), normalised values without geometry
    M3D_Seg/0000/<case>/mask_(K, x, y, z).npz
                                  a sparse matrix with a row of x * y * z voxels for each label but the background
    M3D_Seg/dataset_info.json     optional: {"0000": ["liver", ...], ...}, for a 0000.json without labels

The numbers 0000 to 0024 are the collected data sets. An earlier release has 0000/ct/<case>.npy and 0000/gt/<case>.(K, x, y, z).npz. Paths
may begin anywhere: what counts is what follows the data set's number. There are no reports.

In the folder of M3D-Cap, `m3d.read` gives studies the masks of those entries whose image is theirs.

Source: M3D (arXiv 2404.00578), its published preparation scripts and the data set's card. Whether every 0000.json has labels, and the form
of dataset_info.json, could not be seen; both forms of a list of names are read.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from med3dvlm.files import atomic_file, write_json
from med3dvlm.records import Mask, Question, Study

FOLDER = "M3D_Seg"
LESION = re.compile(r"(?i)tumou?r|cancer|lesion|cysts?\b|kyste?\b|stone|metastas")  # names of findings; others are structures
ARRAYS = (".npy",)  # hold x, y, z


class Entry(NamedTuple):
    """A scan with its masks; paths are relative to the root."""

    split: str
    name: str
    image: str
    label: str
    masks: dict[str, Mask]


def splits(root: str | Path) -> list[str]:
    """Return the splits of all its data sets. Raises FileNotFoundError or ValueError where there is none."""
    return list(dict.fromkeys(entry.split for entry in entries(Path(root), needed=True)))


def read(root: str | Path, split: str, failures: list[dict[str, str]] | None = None) -> tuple[list[Study], list[Question]]:
    """Return one split's studies, without reports and questions.

    Args:
        failures: takes {"study", "file", "reason"} of every study whose image or mask is missing; without it that is an error.

    Raises:
        FileNotFoundError, ValueError: a file or an entry is missing or wrong; the message says where.
    """
    root = Path(root)
    found = list(entries(root, needed=True))
    if split not in (known := dict.fromkeys(entry.split for entry in found)):
        raise ValueError(f"{root} has no split {split!r}; it has: {', '.join(known)}")
    studies = []
    for entry in found:
        if entry.split != split:
            continue
        missing = next((path for path in (entry.image, entry.label) if not (root / path).exists()), None)
        if missing is None:
            reading = {"transpose": True} if entry.image.endswith(ARRAYS) else {}
            studies.append(Study(entry.name, entry.name, entry.image, "", {}, split, "m3d_seg", reading, entry.masks))
        elif failures is None:
            raise FileNotFoundError(f"{root / missing}, of {entry.name}, is missing")
        else:
            failures.append({"study": entry.name, "file": missing, "reason": f"{root / missing} is missing"})
    return studies, []


def entries(root: Path, needed: bool = False) -> Iterator[Entry]:
    """Yield each entry of every data set, none where there is no M3D-Seg; with `needed` that is a FileNotFoundError."""
    base = next((folder for folder in (root / FOLDER, root) if list(folder.glob("[0-9]*/[0-9]*.json"))), None)
    if base is None:
        if needed:
            raise FileNotFoundError(f"{root / FOLDER / '0000' / '0000.json'} is missing; an M3D-Seg root holds folders 0000, 0001, ...")
        return
    for listing in sorted(base.glob("[0-9]*/[0-9]*.json")):
        code = listing.parent.name
        if listing.stem != code:
            continue
        content = json_object(listing)
        names = _labels(listing, content, base)
        for split, listed in content.items():
            if not isinstance(listed, list):
                continue
            for number, entry in enumerate(listed, start=1):
                where = f"{listing}, entry {number} of {split!r}"
                if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("image", "label")):
                    raise ValueError(f'{where} must be {{"image": path, "label": path}}')
                image, label = (_path(root, base, code, entry[name]) for name in ("image", "label"))
                try:
                    yield Entry(split, _name(code, label), image, label, _masks(label, names, entry.get("about")))
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{where}: {error}") from error


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError where the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object but is something else")
    return content


def _labels(listing: Path, content: Mapping[str, Any], base: Path) -> list[str]:
    """Return the names of the labels 1, 2, ..."""
    shared = base / "dataset_info.json"
    labels = content.get("labels") or (json_object(shared).get(listing.parent.name) if shared.is_file() else None)
    if isinstance(labels, dict):
        labels = [labels[number] for number in sorted(labels, key=int) if int(number) > 0]
    if not labels or not isinstance(labels, list):
        raise ValueError(f'{listing} names no labels; add "labels": {{"0": "background", "1": name, ...}}')
    return [str(name) for name in labels]


def _path(root: Path, base: Path, code: str, path: str) -> str:
    """Return the path relative to the root, from a path that may begin anywhere."""
    parts = PurePosixPath(path).parts
    if code in parts[:-1]:
        return (base / Path(*parts[parts.index(code) :])).relative_to(root).as_posix()
    return PurePosixPath(path).as_posix()


def _name(code: str, label: str) -> str:
    """`M3D_Seg/0000/1/mask_(1, 512, 512, 96).npz` -> `0000/1`, `0000/gt/case_3.(1, 512, 512, 96).npz` -> `0000/case_3`."""
    path = PurePosixPath(label)
    case = path.name.split(".(")[0] if ".(" in path.name else path.parent.name
    return f"{code}/{case}"


def _masks(label: str, names: Sequence[str], about: Any) -> dict[str, Mask]:
    if about is not None:
        if unknown := [name for name in about if name not in names]:
            raise ValueError(f"'about' names {unknown[0]!r}, which is not one of the labels")
        return {name: Mask(label, channel=names.index(name), **facts) for name, facts in about.items()}
    found: dict[str, Mask] = {}
    for channel, name in enumerate(names):
        words, count = name.replace("_", " "), 2
        while words in found:  # some of the released lists have a name twice
            words, count = f"{name} ({count})", count + 1
        found[words] = Mask(label, channel=channel, kind="finding" if LESION.search(name) else "structure", side=side_in(name))
    return found


def side_in(words: str) -> str:
    """Return the side that words name, "" where they name none or both: `kidney left` -> "left"."""
    sides = {side for side in ("left", "right") if re.search(rf"(?i)(?<![a-z]){side}(?![a-z])", words)}
    return sides.pop() if len(sides) == 1 else ""


def write_masks(folder: Path, masks: Sequence[NDArray[np.bool_] | None], shape: tuple[int, int, int]) -> Path:
    """Write masks (D, H, W), None for an empty one, as one sparse file into a folder; returns its path."""
    from scipy.sparse import csr_matrix

    sizes = (len(masks), *shape[::-1])
    columns = [np.zeros(0, np.int64) if mask is None else np.flatnonzero(mask.transpose(2, 1, 0)) for mask in masks]
    starts = np.cumsum([0, *map(len, columns)])
    voxels = np.concatenate(columns)
    matrix = csr_matrix((np.ones(len(voxels), np.uint8), voxels, starts), shape=(sizes[0], int(np.prod(shape))))
    path = folder / f"mask_{sizes}.npz"
    fields = {"indices": matrix.indices, "indptr": matrix.indptr, "format": b"csr", "shape": matrix.shape, "data": matrix.data}
    with atomic_file(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, value in fields.items():  # what scipy.sparse.save_npz writes, in a third of its time
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(value))
    return path


def write(root: str | Path, studies: Sequence[Study], labels: Sequence[str], code: str = "0000") -> None:
    """List studies whose masks `write_masks` wrote with a channel for each label, in this layout."""
    listing: dict[str, Any] = {
        "name": f"{code} Dataset",
        "labels": {str(number): name for number, name in enumerate(("background", *labels))},
    }
    for study in studies:
        facts = {
            name: {key: value for key, value in vars(mask).items() if key not in ("file", "channel", "value")}
            for name, mask in study.masks.items()
        }
        for file in {mask.file for mask in study.masks.values()}:
            listing.setdefault(study.split, []).append({"image": study.image, "label": file, "about": facts})
    write_json(Path(root) / FOLDER / code / f"{code}.json", listing)
