"""Fixtures of the page's tests: a model that repeats its input, the page on localhost, and small scans."""

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from gradio_client import Client

from med3dvlm.app import chat as app
from med3dvlm.app.analysis import Analysis, Case
from med3dvlm.app.page import build
from med3dvlm.app.workstation import Workstation
from med3dvlm.inference.chat import Answer
from med3dvlm.volume import Volume

from .browsing import browser, visit  # noqa: F401  fixtures

REPORT = "Findings: A nodule of 8 mm in the right upper lobe. No pleural effusion.\nImpression: Nodule."


class Parrot:
    """Says how many slices the scan has, the question and the number of earlier messages; knows only scans of 10 slices."""

    def __init__(self) -> None:
        self.histories: list[list[dict[str, str]]] = []
        self.sampling: list[dict[str, float]] = []
        self.encoded: list[int] = []
        self.running = 0
        self.report = REPORT

    def encode(self, volume: Volume) -> Volume:
        self.encoded.append(len(volume.array))
        return volume

    def out_of_distribution(self, volume: Volume) -> SimpleNamespace:
        return SimpleNamespace(message=None if len(volume.array) == 10 else "Unlike <anything> seen in training.")

    def stream(self, volume: Volume, question: str, history: list[dict[str, str]], **sampling: float) -> Generator[str, None, Answer]:
        self.histories.append(history)
        self.sampling.append(sampling)
        if question == "too small":
            raise ValueError("The volume is too small for the encoder.")
        if question == "silence":
            return Answer("", 1, 0.1, 0.9)
        text = f"{len(volume.array)} slices. <b>{question}</b> ${{1 + 1}} & {len(history)}"
        text = self.report if question == "Describe the findings." else text + " word" * 10_000 * ("slowly" in question)
        self.running += 1
        try:
            for word in text.split(" "):
                time.sleep(0.02)
                yield word + " "
        finally:
            self.running -= 1
        return Answer(text, len(text.split()), 1.5, 0.25 if "doubtful" in question else 0.9)


def spot(volume: Volume, *asked: object) -> tuple[np.ndarray, int]:
    """Returns a saliency map with one bright corner, or an empty one for the phrase "nothing"."""
    if asked == ("nothing",):
        raise ValueError("The phrase says nothing.")
    cells = np.zeros([-(-length // 2) for length in volume.shape], np.float32)
    cells[1:3, 1:4, 1:4] = 1
    return cells, 2


def alike(volume: Volume) -> list[Case]:
    return [Case(0.91, "<b>Clear</b> lungs.", np.arange(64, dtype=np.uint8).reshape(8, 8)), Case(0.5, "A nodule.", None)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    uploads, parrot = tmp_path_factory.mktemp("uploads"), Parrot()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        patch.setenv("GRADIO_HEARTBEAT_INTERVAL", "0.3")  # how soon a closed page is noticed
        workstation = Workstation(parrot, "parrot", max_bytes=2**20, analysis=Analysis(spot, spot, alike))
        blocks = build(workstation, parallel=2)
        address = app.launch(blocks, workstation)
        yield SimpleNamespace(address=address, uploads=uploads, parrot=parrot, workstation=workstation, port=blocks.server_port)
        blocks.close(verbose=False)


@pytest.fixture
def client(server: SimpleNamespace) -> Callable[[], Client]:
    return lambda: Client(server.address, verbose=False, analytics_enabled=False, download_files=False)


@pytest.fixture(scope="session")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """scan(slices): a NIfTI in Hounsfield units of 20 rows and 30 columns."""

    def write(slices: int = 10, name: str = "Doe_Jane.nii.gz") -> Path:
        array = np.random.default_rng(slices).integers(-1000, 1000, (30, 20, slices)).astype(np.int16)
        path = tmp_path_factory.mktemp("scans") / name
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.5, 1.0])), path)
        return path

    return write


def files_with_content(folder: Path) -> list[Path]:
    return [Path(place, name) for place, _, names in os.walk(folder) for name in names if Path(place, name).stat().st_size]
