"""The files of a scan, and the detection of any change in them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from med3dvlm.formats import scan_files, state_of


@pytest.fixture(params=["header", "folder"])
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An .mhd file with voxels in a file of another name, and a nested DICOM export; other files lie beside both."""
    if request.param == "header":
        array = np.random.default_rng(0).integers(-1000, 1000, (10, 20, 30), np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), tmp_path / "a[1].mhd")
        (tmp_path / "a[1].raw").rename(tmp_path / "voxels.bin")
        text = (tmp_path / "a[1].mhd").read_text().replace("a[1].raw", "voxels.bin")
        (tmp_path / "a[1].mhd").write_text(text)
        (tmp_path / "a[1].txt").write_text("beside")
        return tmp_path / "a[1].mhd"
    deep = tmp_path / "export" / "ST1" / "SE2"
    deep.mkdir(parents=True)
    for number in range(4):
        (deep / f"IM{number}").write_bytes(bytes([number]) * 50000)
    (tmp_path / "beside").write_text("beside")
    return tmp_path / "export"


def rewrite(path: Path, place: int) -> None:
    """Change one byte of a file and keep its size and date."""
    content, state = bytearray(path.read_bytes()), path.stat()
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_the_files_of_a_scan(scan: Path) -> None:
    names = [file.name for file in scan_files(scan)]
    assert names == (["a[1].mhd", "voxels.bin"] if scan.is_file() else ["IM0", "IM1", "IM2", "IM3"])


@pytest.mark.parametrize("contents", [False, True])
def test_the_state_depends_on_the_files_of_the_scan_only(scan: Path, contents: bool) -> None:
    last = scan_files(scan)[-1]
    states = [state_of(scan, contents)]
    (scan.parent / "beside").write_text("changed")
    if scan.is_dir():
        (scan / ".#lock").symlink_to("nowhere")
    assert state_of(scan, contents) == states[0]
    for change in (
        lambda: rewrite(last, -1),
        lambda: rewrite(last, 0),
        lambda: os.utime(last, (1e9, 1e9)),
        lambda: last.write_bytes(last.read_bytes() + b"more"),
        lambda: last.unlink(),
    ):
        change()
        states.append(state_of(scan, contents))
    assert len(set(states)) == len(states)


def test_changes_that_keep_size_and_date_are_detected(scan: Path) -> None:
    """`cp -p` or a restored backup keep both; the time of the last status change, which cannot be set, shows the change."""
    for place in (20_000 if scan.is_dir() else 2000, 7):
        before = state_of(scan)
        rewrite(scan_files(scan)[-1], place)
        assert state_of(scan) != before


def test_a_copy_has_the_same_contents(scan: Path, tmp_path: Path) -> None:
    shutil.copytree(scan.parent, tmp_path.parent / (tmp_path.name + " copy"))
    copy = tmp_path.parent / (tmp_path.name + " copy") / scan.name
    assert state_of(copy, contents=True) == state_of(scan, contents=True)
    assert state_of(copy) != state_of(scan)


def test_a_missing_scan(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        state_of(tmp_path / "none.nii")
