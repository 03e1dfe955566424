"""Damaged and hostile files of every format give an error in words or a correct volume, never another exception, a hang or a crash.

Files are read in a separate process with bounded memory, since ITK and the decoders are C and C++. Examples are the same in every run.
"""

import gzip
import multiprocessing
import resource
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import JPEGLSLossless

from tests.formats.dicom_files import write_enhanced, write_series
from tests.formats.scans import outcome, write_nifti

MEMORY = 12 * 2**30  # address space; the libraries alone map some
SECONDS = 20
SMALL = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
CHECKED = (".nii.gz", ".npz", ".zip")  # with a checksum: damage never goes unnoticed

# Some bytes replaced, most of them in the first 400, where headers are; then the end cut off.
Damage = tuple[list[tuple[int, int]], int]
damages = st.tuples(
    st.lists(st.tuples(st.integers(0, 400) | st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.just(0) | st.integers(0, 1200),
)


def write_itk(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(SMALL), path, useCompression=path.stem == "packed")
    return path


def write_arrays(path: Path) -> Path:
    np.savez_compressed(path, image=SMALL, spacing=[2.5, 0.8, 0.7])
    return path


def write_array(path: Path) -> Path:
    np.save(path, SMALL)
    return path


def write_archive(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(write_array(path.with_suffix(".npy")), "scan.npy")
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "scan.nii": lambda path: write_nifti(path, SMALL),
    "scan.nii.gz": lambda path: write_nifti(path, SMALL),
    "scan.nrrd": write_itk,
    "packed.nrrd": write_itk,
    "scan.mha": write_itk,
    "packed.mha": write_itk,
    "scan.mhd": write_itk,
    "scan.nhdr": write_itk,
    "scan.npy": write_array,
    "scan.npz": write_arrays,
    "scan.dcm": lambda path: write_enhanced(path, SMALL),
    "scan.zip": write_archive,
}


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.fixture(scope="module")
def read() -> Iterator[Callable[[Path], tuple[str, np.ndarray | None]]]:
    """Return outcome(path) of the other process; a crash raises BrokenProcessPool, a hang TimeoutError."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), bounded) as other:
        assert other.submit(outcome, "nothing").result(timeout=300) == ("refused", None)  # the imports take their time
        yield lambda path: other.submit(outcome, str(path)).result(timeout=SECONDS)


def damaged(content: bytes, damage: Damage) -> bytes:
    replaced, cut = damage
    array = bytearray(content)
    for place, value in replaced:
        if place < len(array):
            array[place] = value
    return bytes(array[: len(array) - cut])


hostile = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate,),  # making an example smaller would wait for each hang again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", list(WRITERS))
def test_damaged_files(tmp_path: Path, read: Callable, name: str) -> None:
    path = WRITERS[name](tmp_path / name)
    whole = path.read_bytes()
    kind, array = read(path)
    assert kind == "volume"
    np.testing.assert_array_equal(array, SMALL)

    @hostile
    @given(damages)
    def check(damage: Damage) -> None:
        content = damaged(whole, damage)
        path.write_bytes(content)
        kind, array = read(path)
        assert kind in ("refused", "volume")
        if kind == "volume" and (not damage[0] or path.name.endswith(CHECKED)):
            np.testing.assert_array_equal(array, SMALL)

    check()


@hostile
@given(damages)
def test_damaged_headers_within_a_sound_gzip_file(tmp_path: Path, read: Callable, damage: Damage) -> None:
    whole = gzip.decompress(write_nifti(tmp_path / "scan.nii.gz", SMALL).read_bytes())
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(damaged(whole, damage), mtime=0))
    kind, array = read(tmp_path / "scan.nii.gz")
    assert kind in ("refused", "volume")
    if kind == "volume" and not damage[0]:
        np.testing.assert_array_equal(array, SMALL)


@pytest.mark.parametrize("name", ["{}.png", "{}.jpg"])
def test_damaged_pictures(tmp_path: Path, read: Callable, name: str) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (4, 12, 14)).astype(np.uint8)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / name.format(number))
    path = tmp_path / name.format(2)
    whole = path.read_bytes()
    sound = read(tmp_path)[1]
    assert sound is not None

    @hostile
    @given(damages)
    def check(damage: Damage) -> None:
        path.write_bytes(damaged(whole, damage))
        kind, array = read(tmp_path)
        assert kind in ("refused", "volume")
        if kind == "volume" and array.shape == sound.shape and name == "{}.png":
            np.testing.assert_array_equal(array, sound)

    check()


@pytest.mark.parametrize("dimension", ["-1", "0", "1e9", ""])
def test_a_meta_image_without_dimensions(tmp_path: Path, read: Callable, dimension: str) -> None:
    """ITK hangs on the first."""
    header = f"NDims = {dimension}\nDimSize = 7 6 5\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "scan.mha").write_bytes(header.encode() + SMALL.tobytes())
    assert read(tmp_path / "scan.mha")[0] == "refused"


def test_a_damaged_slice_among_sound_ones(tmp_path: Path, read: Callable) -> None:
    path = sorted(write_series(tmp_path, SMALL, syntax=JPEGLSLossless).iterdir())[2]
    whole = path.read_bytes()

    @hostile
    @given(damages)
    def check(damage: Damage) -> None:
        path.write_bytes(damaged(whole, damage))
        assert read(tmp_path)[0] in ("refused", "volume")

    check()


NUMBERS = st.sampled_from([-1, 0, 1, 2, 5, 6, 7, 32767, 2**31 - 1, 2**31, 2**63, -(2**31), 1e38, float("nan"), float("inf")])


@hostile
@given(sizes=st.lists(NUMBERS, min_size=0, max_size=5), spacing=st.lists(NUMBERS, min_size=0, max_size=5), data=st.data())
def test_headers_of_nonsense(tmp_path: Path, read: Callable, sizes: list[float], spacing: list[float], data: st.DataObject) -> None:
    """Text headers have the right form but invalid numbers."""
    kind = data.draw(st.sampled_from(["short", "uchar", "float", "double", "block", "unsigned long long", "MET_SHORT", "MET_OTHER"]))
    dimension = data.draw(NUMBERS | st.just(len(sizes)))
    text = {name: " ".join(f"{number:g}" for number in numbers) for name, numbers in (("sizes", sizes), ("spacing", spacing))}
    encoding = data.draw(st.sampled_from(["raw", "gzip", "bzip2", "ascii", "hex", "none"]))
    nrrd = (
        f"NRRD0004\ntype: {kind}\ndimension: {dimension:g}\nsizes: {text['sizes']}\nspacings: {text['spacing']}\nencoding: {encoding}\n\n"
    )
    meta = f"NDims = {dimension:g}\nDimSize = {text['sizes']}\nElementSpacing = {text['spacing']}\nElementType = {kind}\n"
    meta += f"CompressedData = {encoding != 'raw'}\nElementDataFile = LOCAL\n"
    for name, header in (("scan.nrrd", nrrd), ("scan.mha", meta)):
        (tmp_path / name).write_bytes(header.encode() + SMALL.tobytes())
        assert read(tmp_path / name)[0] in ("refused", "volume")
