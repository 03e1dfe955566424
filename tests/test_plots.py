"""Plots: readable PNGs, written atomically, correctly oriented, without changes to matplotlib's state."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from med3dvlm import plots

CURVES = {"image to text": [(1, 0.1), (5, 0.4), (10, 0.6)], "text to image": [(1, 0.2), (5, 0.3), (10, 0.7)]}
VOLUME = np.random.default_rng(0).random((10, 20, 30), dtype=np.float32)
LOSSES = {"stage 1": [(1, 2.0), (2, float("nan")), (3, 1.0)], "stage 2": [(1, 1.0)]}
REPORT = "hypodense mass in segment VII of the liver. " * 30
STUDY = {"array": VOLUME, "name": "study_1", "title": "axial", "reference": "No $ascites$. " * 60, "prediction": ""}


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.loss_curves(LOSSES, path),
        lambda path: plots.retrieval_curve(CURVES, path, chance=0.01),
        lambda path: plots.retrieval_curve({"image to text": [(1, 0.5)]}, path),
        lambda path: plots.vqa_bars({"plane": 1.0, "phase": 0.0}, {"plane": 0.25}, path),
        lambda path: plots.vqa_bars({"plane": 0.5}, {}, path),
        lambda path: plots.findings_bars({"ascites": 0.5, "gallstone": None}, path, {"ascites": 0.1}, support={}),
        lambda path: plots.roc_curves({f"finding {n}": ([0, 1, 1], [0.1, 0.5, 0.4]) for n in range(8)}, path),
        lambda path: plots.precision_recall_curves({"ascites": ([0, 1], [0.5, 0.4])}, path),
        lambda path: plots.calibration_curve([(0.1, 0.0, 30), (0.95, 1.0, 5)], path),
        lambda path: plots.cases([STUDY, STUDY | {"prediction": "word " * 2000}], path),
        lambda path: plots.montage(VOLUME, (5.0, 0.7, 0.7), path, orientation="SPL"),
        lambda path: plots.montage(VOLUME[:1], None, path),
        lambda path: plots.montage(np.zeros((3, 4, 5), dtype=np.int16), None, path),
    ],
)  # fmt: skip
def test_each_picture_is_a_png_of_report_size(draw: object, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    assert draw(path) == path  # type: ignore[operator]
    pixels = picture(path)
    assert 300 < pixels.shape[1] < 2000 and pixels.std() > 1
    assert pixels[:2].min() > 200 and pixels[:, :2].min() > 200  # nothing is cut off at the upper and left edge
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_text_stays_inside_the_picture(tmp_path: Path) -> None:
    path = plots.cases([STUDY | {"prediction": REPORT}], tmp_path / "cases.png")
    assert picture(path)[:, -4:].min() > 200


def test_montage_orients_slices_as_radiologists_do(tmp_path: Path) -> None:
    """A bright corner at the patient's right front is drawn top left, whatever the storage order."""
    right_front = np.zeros((1, 21, 31), dtype=np.float32)
    right_front[0, :8, :8] = 1  # of "SPL": rows grow backwards, columns to the patient's left
    stored = {
        "SPL": right_front,
        "SAL": right_front[:, ::-1],
        "SPR": right_front[:, :, ::-1],
        "SLP": right_front.transpose(0, 2, 1),
        "IRA": right_front[:, ::-1, ::-1].transpose(0, 2, 1),
    }
    pictures = []
    for orientation, array in stored.items():
        path = plots.montage(array, (1, 1, 1), tmp_path / f"{orientation}.png", orientation=orientation, columns=1, rows=1, window=(0, 1))
        pictures.append(picture(path))
    first = pictures[0]
    slice_top = np.argmax((first < 10).all(axis=2).any(axis=1))
    corner = first[slice_top : slice_top + 60, 5:60]
    assert corner[:, :, 0].mean() > 150
    height = int(1.6 * plots.DOTS_PER_INCH * 21 / 31)  # the slice alone: the reformats differ in what is the row and the column
    for other in pictures[1:]:
        assert np.array_equal(first[:height], other[:height])


def test_edges_between_two_directions_are_named_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a scan turned by 40 degrees within its slices, every edge lies between two directions."""
    from matplotlib.axes import Axes

    said, cosine, sine = list[str](), np.cos(np.radians(40)), np.sin(np.radians(40))
    monkeypatch.setattr(Axes, "text", lambda self, x, y, words, **style: said.append(words))
    turned = np.array([[0, sine, -cosine], [0, -cosine, sine], [1, 0, 0]])
    for direction in (turned, np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]]), None):
        plots.montage(VOLUME, (1, 1, 1), tmp_path / "a.png", orientation="SPL", columns=1, rows=1, direction=direction)
    letters = [words for words in said if words.isalpha()]
    assert letters[:4] == ["RP", "LA", "AL", "PR"]  # left, right, top, bottom of an axial slice
    assert letters[12:16] == letters[24:28] == ["R", "L", "A", "P"]


def test_montage_keeps_true_proportions(tmp_path: Path) -> None:
    """A cube of 20 mm in anisotropic voxels is square in every plane."""
    spacing = (5.0, 1.0, 2.0)
    array = np.zeros((12, 60, 30), dtype=np.float32)
    array[4:8, 20:40, 10:20] = 1
    pixels = picture(plots.montage(array, spacing, tmp_path / "cube.png", window=(0, 1)))
    white = (pixels == 255).all(axis=2) & True
    dark = (pixels < 10).all(axis=2)
    rows = np.flatnonzero(dark.any(axis=1))
    lower = white[rows[-1] - 200 : rows[-1] - 5]  # within the reformats
    left = lower[:, 20 : pixels.shape[1] // 2 - 20]
    tall, wide = left.any(axis=1).sum(), left.any(axis=0).sum()
    assert tall == pytest.approx(wide, rel=0.1)


def test_an_interrupted_plot_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = plots.retrieval_curve(CURVES, tmp_path / "curve.png")
    before = path.read_bytes()

    def broken(self: Figure, target: Path, **settings: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        plots.retrieval_curve(CURVES, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, med3dvlm.plots as plots; assert 'matplotlib' not in sys.modules;"
        f"plots.vqa_bars({{'plane': 1.0}}, {{}}, {str(tmp_path / 'bars.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_input(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="at least one stage"):
        plots.loss_curves({}, path)
    with pytest.raises(ValueError, match="no points for 'stage 2'"):
        plots.loss_curves({"stage 1": [(1, 1.0)], "stage 2": []}, path)
    with pytest.raises(ValueError, match=r"shape \(20, 30\)"):
        plots.montage(VOLUME[0], None, path)
    with pytest.raises(ValueError, match="orientation='SPX'"):
        plots.montage(VOLUME, None, path, orientation="SPX")
    with pytest.raises(ValueError, match="three positive millimetres"):
        plots.montage(VOLUME, (0.0, 1.0, 1.0), path)
    with pytest.raises(ValueError, match="at least one study"):
        plots.cases([], path)
    assert not path.exists()
