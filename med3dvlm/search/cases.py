"""CaseIndex: the cases of a data set by the Med3DCLIP embeddings of their scans.

    <folder>/index.json               which model and which data, by path and fingerprint; the split; how many
    <folder>/embeddings.safetensors   "scans" (N, P) float32 of length 1, and "lines" (N + 1), where each case begins in cases.jsonl
    <folder>/cases.jsonl              id, split, report, labels, and the checksum of the prepared volume
    <folder>/nearest.faiss            beyond EXACT_UP_TO cases, see vectors.py

The folder is all that a search by an embedding needs; text and scan need the model besides, and pictures the prepared data. No patient is
named: a case is known by the id that the data set's owner gave it.

float32, as the model gives them, so that a similarity here is the model's to the last bit. float16 would save 1 KB a case, of which the
prepared volume has 8 MB; and processors that do not compute in it convert at every search.

Shapes: N cases, Q queries, P the width of the model's space.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from med3dvlm.datasets.engines import open_engine
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.store import Opening, PreparedData, read_voxels, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.files import PART, atomic_file, atomic_folder, json_lines, require_free, write_json
from med3dvlm.plots.slices import grey
from med3dvlm.preprocessing import SETTINGS, Scan, VolumeProcessor
from med3dvlm.records import Study
from med3dvlm.search import vectors
from med3dvlm.search.embedding import Embedder
from med3dvlm.search.vectors import Vectors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """A case that was found: `similarity` is the cosine with what was searched for, `checksum` that of the prepared volume."""

    id: str
    similarity: float
    split: str
    report: str
    labels: dict[str, int]
    checksum: str


class CaseIndex:
    """An index, opened.

        index = CaseIndex.build("outputs/demo/stage1", PreparedData("outputs/demo/prepared"), Path("outputs/demo/index"))
        index = CaseIndex("outputs/demo/index")
        for hit in index.search_text(["pleural effusion"], top=3)[0]:
            print(hit.similarity, hit.id, hit.report)

    Args:
        model: where the model that made the index is now, by default where it was then.
        device: of the model, by default the GPU where there is one.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged.
    """

    def __init__(self, folder: str | Path, model: str | Path | None = None, device: str | None = None) -> None:
        self.folder, self.device = Path(folder), device
        if not (self.folder / "index.json").is_file():
            raise FileNotFoundError(f"{folder} holds no index of cases (no index.json); make one with: med3dvlm index MODEL DATA {folder}")
        self.facts: dict[str, Any] = json.loads((self.folder / "index.json").read_text(encoding="utf-8-sig"))
        self.model = Path(model or self.facts["model"])
        with safe_open(self.folder / "embeddings.safetensors", "pt") as file:  # by torch, which maps the file into memory
            self.scans: Vectors = file.get_tensor("scans").numpy()
            self._lines: NDArray[np.int64] = file.get_tensor("lines").numpy()
        if (self.folder / "cases.jsonl").stat().st_size != self._lines[-1]:
            raise ValueError(f"{self.folder / 'cases.jsonl'} is not the file that was written with the index; make the index anew")

    def __len__(self) -> int:
        return len(self.scans)

    @classmethod
    def build(
        cls,
        model: str | Path,
        data: PreparedData,
        folder: str | Path,
        split: str | None = None,
        batch_size: int = 16,
        device: str | None = None,
        engine: str = "local",
    ) -> "CaseIndex":
        """Embed the scans of a split, or of all, and write the index. A run that was killed is continued by the same call.

        Args:
            engine: "local", this process, or "ray" (see `datasets.engines`): machines that see model and data at the same places.

        Raises:
            FileExistsError: the folder exists and is not empty.
            ValueError: the data was prepared otherwise than the model takes it, or a study has no report.
        """
        folder = Path(folder)
        require_free(folder)
        splits = [split] if split else [name for name, count in sorted(data.summary["splits"].items()) if count]
        studies = [study for name in splits for study in data.studies(name)]
        if missing := [study.id for study in studies if not study.report.strip()]:
            raise ValueError(f"{len(missing)} studies have no report, the first is {missing[0]}; leave them out with --split-file")
        embedder = Embedder(model, device)
        same_preprocessing(embedder.processor.image_processor, data)
        facts = {
            "model": os.path.abspath(model),
            "model_fingerprint": _fingerprint(embedder),
            "data": str(data.root) if data.remote else os.path.abspath(data.root),
            "data_fingerprint": data.summary["fingerprint"],
            "split": split,
            "cases": len(studies),
            "width": embedder.model.config.projection_dim,
        }
        part = folder.with_name(f".{folder.name}{PART}")
        with open_engine(engine, 0, gpus=True) as run:
            fingerprints = (facts["model_fingerprint"], facts["data_fingerprint"])
            here, there = partial(_embed_batch, embedder, data), partial(_embed_there, facts["model"], data.opening, fingerprints)
            scans = _embed(partial(run, here if engine == "local" else there, lost=_lost), studies, batch_size, part, facts)
        with atomic_folder(folder) as aside:
            lines = [0]
            with (aside / "cases.jsonl").open("wb") as file:
                for study in studies:
                    case = {"id": study.id, "split": study.split, "report": study.report, "labels": study.labels}
                    file.write(json_lines([case | {"checksum": data.checksum(study)}]).encode())
                    lines.append(file.tell())
            with atomic_file(aside / "embeddings.safetensors") as file_aside:
                save_file({"scans": scans, "lines": np.array(lines)}, file_aside)
            if len(studies) > vectors.EXACT_UP_TO:
                vectors.build(scans, aside / "nearest.faiss")
            write_json(aside / "index.json", facts)
        shutil.rmtree(part)
        return cls(folder, model, device)

    @cached_property
    def embedder(self) -> Embedder:
        """Return the model that made the index.

        Raises:
            FileNotFoundError, ValueError: it is not there any more, or another one is.
        """
        if not self.model.is_dir():
            raise FileNotFoundError(f"{self.model}, the model of the index {self.folder}, is not there; name its present folder by --model")
        embedder = Embedder(self.model, self.device)
        if (found := _fingerprint(embedder)) != (made := self.facts["model_fingerprint"]):
            raise ValueError(
                f"{self.model} (fingerprint {found}) is not the model that made the index {self.folder} (fingerprint {made}); "
                "search with that one, or index the data with this one"
            )
        return embedder

    @cached_property
    def _nearest(self) -> Any:
        path = self.folder / "nearest.faiss"
        return vectors.open_index(path) if path.is_file() else None

    def search(self, embeddings: Vectors, top: int = 5, exact: bool = False) -> list[list[Hit]]:
        """Return the nearest cases of each of (Q, P) unit vectors, the nearest first; with `exact` every case is compared.

        Raises:
            ValueError: none is asked for, or the vectors are of another width or not finite.
        """
        if top < 1:
            raise ValueError(f"{top} cases are asked for (--top); ask for at least 1")
        if embeddings.ndim != 2 or embeddings.shape[1] != self.scans.shape[1]:
            raise ValueError(f"queries must be (Q, {self.scans.shape[1]}) but are {embeddings.shape}; embed them with the index's model")
        if not np.isfinite(embeddings).all():
            raise ValueError("the model gives no finite numbers for what is searched for; search with another scan or text")
        top = min(top, len(self))
        if exact or self._nearest is None:
            found = vectors.exact(self.scans, embeddings, top)
        else:
            found = vectors.by_index(self._nearest, self.scans, embeddings, top)
        with (self.folder / "cases.jsonl").open("rb") as file:

            def hit(row: int, similarity: float) -> Hit:
                file.seek(int(self._lines[row]))
                return Hit(similarity=similarity, **json.loads(file.readline()))

            return [[hit(*pair) for pair in zip(rows.tolist(), cosines.tolist(), strict=True)] for rows, cosines in found]

    def search_text(self, texts: Sequence[str], top: int = 5, exact: bool = False) -> list[list[Hit]]:
        """Return for each text the cases with the nearest scans: a finding, a question, or a whole report.

        Raises:
            ValueError: a text is empty; see also `embedder` and `search`.
        """
        if any(not text.strip() for text in texts):
            raise ValueError("the text to search for is empty; give a finding or a sentence, as in --text 'pleural effusion'")
        return self.search(self.embedder.texts(texts).numpy(), top, exact)

    def search_scan(self, scan: Scan, top: int = 5, exact: bool = False) -> list[Hit]:
        """Return the cases whose scans are the nearest to a scan: a path, a Volume, or a prepared tensor.

        Raises:
            VolumeError: the scan cannot be read, or does not have what the model's preprocessing needs; see also `embedder` and `search`.
        """
        pixel_values = self.embedder.processor(scan)["pixel_values"]
        return self.search(self.embedder.volumes(pixel_values).numpy(), top, exact)[0]

    def picture(self, hit: Hit) -> NDArray[np.uint8] | None:
        """Return (H, W), the middle slice along D of the prepared volume, the lowest value black and the highest white.

        Slices lie as the preprocessing puts them: those of an axial scan are axial. None where the prepared data is no longer there.

        Raises:
            ValueError: the volume is another one than was indexed.
        """
        root = Path(self.facts["data"])
        path = root / "volumes" / f"{hit.id}.safetensors"
        if not path.is_file():
            return None
        voxels = read_voxels(path, hit.checksum)  # (D, H, W)
        grid = VolumeProcessor.from_pretrained(root).grid
        return grey(voxels[len(voxels) // 2], (grid.low, grid.high))


def _fingerprint(embedder: Embedder) -> str:
    """Return a fingerprint of everything that makes an embedding out of a scan."""
    return fingerprint(embedder.model, json.dumps({name: getattr(embedder.processor.image_processor, name) for name in SETTINGS}))


def _embed_batch(embedder: Embedder, data: PreparedData, batch: Sequence[Study]) -> Vectors:
    """Return embeddings (B, P) of a batch of studies' scans."""
    made: Vectors = embedder.volumes(load_volumes(data, batch, embedder.model.device)).numpy()
    if not np.isfinite(made).all():
        raise ValueError(f"the model gives no finite numbers for one of {', '.join(study.id for study in batch)}; train it anew")
    return made


def _embed_there(model: str, opening: Opening, made_by: tuple[str, str], batch: Sequence[Study]) -> Vectors:
    """Embed as `_embed_batch`, in a process that opens model and data once."""
    embedder, data, found = _opened(model, opening)
    if found != made_by:
        raise ValueError(
            f"machine {socket.gethostname()} has another model under {model}, or other data under {opening.root}; copy both anew"
        )
    return _embed_batch(embedder, data, batch)


@lru_cache(maxsize=1)
def _opened(model: str, opening: Opening) -> tuple[Embedder, PreparedData, tuple[str, str]]:
    embedder, data = Embedder(model), opening.reopen()
    return embedder, data, (_fingerprint(embedder), data.summary["fingerprint"])


def _lost(reason: str) -> Vectors:
    raise ValueError(f"a batch of scans could not be embedded: {reason}; run the command again")


def _embed(
    make: Callable[[Iterable[Sequence[Study]]], Iterator[Vectors]],
    studies: Sequence[Study],
    batch_size: int,
    part: Path,
    facts: dict[str, Any],
) -> Vectors:
    """Return embeddings (N, P) of the studies' scans, which `make` gives for batches of them.

    The folder `part` keeps them as they are made, with `facts` about them.
    """
    about, grown = part / "index.json", part / "scans.float32"
    if about.is_file() and json.loads(about.read_text(encoding="utf-8-sig")) != facts:
        logger.warning("%s was begun with another model or other data; the index is made from the start", part)
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    write_json(about, facts)
    width = facts["width"]
    with grown.open("ab") as file:
        # Only whole batches are kept: a scan is always computed beside the same others, and gets the same bits.
        done = file.tell() // (width * 4 * batch_size) * batch_size
        file.truncate(done * width * 4)
        with tqdm(total=len(studies), initial=done, desc="scans", unit="scan") as progress:
            for made in make(studies[first : first + batch_size] for first in range(done, len(studies), batch_size)):
                file.write(made.tobytes())
                file.flush()
                progress.update(len(made))
    if grown.stat().st_size != len(studies) * width * 4:
        raise ValueError(
            f"{grown} has not the length of {len(studies)} scans, perhaps because another run writes to it; delete {part} and run again"
        )
    return np.memmap(grown, np.float32, "r", shape=(len(studies), width))
