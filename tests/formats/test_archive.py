"""Zip archives: read like the folder in them, or refused without writing anything."""

import os
import stat
import struct
import tempfile
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from med3dvlm.formats import archive
from med3dvlm.formats.base import VolumeError
from tests.formats.dicom_files import AFFINE, scan, write_series


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert after each test that no temporary folder is left and nothing is written beside it."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert list(place.iterdir()) == []
    assert not (tmp_path / "evil").exists() and not Path("/evil").exists()


def packed(path: Path, folder: Path, inside: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for each in sorted(folder.rglob("*")):
            file.write(each, f"{inside}{each.relative_to(folder)}")
    return path


def archive_of(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def refused(path: Path, match: str, **options: int) -> None:
    with pytest.raises(VolumeError, match=match) as caught:
        archive.read(path, "scan.zip", **options)
    message = str(caught.value)
    assert message.startswith("scan.zip: ") and message.endswith(".") and "\n" not in message and "evil" not in message


def test_a_zip_of_a_dicom_export(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "in", scan(), names="nested")
    write_series(folder / "other", scan()[:3] + 7, prefix="other")
    (folder / "autorun.inf").write_text("open=viewer.exe")
    for inside in ("", "Secret Name/20010203/"):
        path = packed(tmp_path / "scan.zip", folder, inside)
        parts = archive.read(path, "scan.zip")
        np.testing.assert_array_equal(parts.array, scan())
        assert parts.series == ("1: 10 slices of 20 x 30, CT", "2: 3 slices of 20 x 30, CT")
        assert "secret" not in repr(parts[1:]).lower()
        np.testing.assert_array_equal(archive.read(path, "scan.zip", series=2).array, scan()[:3] + 7)


def test_a_zip_of_one_scan_file(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(scan().transpose(), AFFINE), tmp_path / "scan.nii.gz")
    np.save(tmp_path / "scan.npy", scan())
    nifti, npy = (tmp_path / "scan.nii.gz").read_bytes(), (tmp_path / "scan.npy").read_bytes()
    parts = archive.read(archive_of(tmp_path / "one.zip", ("case/scan.nii.gz", nifti), ("case/findings.txt", b"none")), "scan.zip")
    np.testing.assert_array_equal(parts.array, scan())
    np.testing.assert_allclose(parts.axes, AFFINE[:3, :3], atol=1e-6)
    refused(archive_of(tmp_path / "two.zip", ("scan.nii.gz", nifti), ("scan.npy", npy)), "holds several scans; unpack it")
    folder = write_series(tmp_path / "both", scan())
    (folder / "scan.npy").write_bytes(npy)
    refused(packed(tmp_path / "both.zip", folder), "holds several scans")


def test_a_zip_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pictures = np.random.default_rng(0).integers(0, 255, (12, 20, 30)).astype(np.uint8)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "in" / f"{index}.png")
    np.testing.assert_array_equal(archive.read(packed(tmp_path / "scan.zip", tmp_path / "in", "a/b/"), "scan.zip").array, pictures)


def test_files_added_by_macos_and_nested_archives_are_ignored(tmp_path: Path) -> None:
    path = packed(tmp_path / "scan.zip", write_series(tmp_path / "in", scan()), "scan/")
    with zipfile.ZipFile(path, "a") as file:
        for name in ("__MACOSX/scan/._IM0001.dcm", "scan/._scan.nii.gz", "scan/.DS_Store", "Thumbs.db", "scan/more.zip"):
            file.writestr(name, b"not what its name says")
    np.testing.assert_array_equal(archive.read(path, "scan.zip").array, scan())
    refused(archive_of(tmp_path / "nested.zip", ("scan.zip", path.read_bytes())), "no files other than archives")


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "C:\\evil", "c:evil", "..\\evil", "a\\..\\..\\evil", "\\\\host\\evil"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    entry = zipfile.ZipInfo("x")
    entry.filename = name  # the constructor would tidy it
    refused(archive_of(tmp_path / "scan.zip", ("0001.png", b"x"), (entry, b"evil")), "written outside")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices(tmp_path: Path, kind: int) -> None:
    entry = zipfile.ZipInfo("link")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    refused(archive_of(tmp_path / "scan.zip", (entry, b"/etc/passwd")), "links or devices")


def test_encrypted_and_rare_compressions_are_refused(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "scan.zip", ("a.dcm", b"content"))
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        content[content.index(signature) + place] |= 1
    path.write_bytes(content)
    refused(path, "encrypted; unpack it with its password")
    folder = write_series(tmp_path / "in", scan())
    refused(packed(tmp_path / "lzma.zip", folder, method=zipfile.ZIP_LZMA), "a way other than Deflate")


def test_too_many_entries(tmp_path: Path) -> None:
    path = archive_of(tmp_path / "many.zip", *((str(number), b"") for number in range(archive.MAX_ENTRIES + 1)))
    refused(path, "more than 20000 entries")


def test_a_million_entries_are_refused_before_listing(tmp_path: Path) -> None:
    one = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0) + b"%06d"
    listing = b"".join(one % number for number in range(1_000_000))
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1_000_000, 1_000_000, len(listing), 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(listing), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "scan.zip").write_bytes(listing + record + locator + end)
    start = time.process_time()
    refused(tmp_path / "scan.zip", "more than 20000 entries")
    assert time.process_time() - start < 0.5


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SMALL", 2**20)
    zeros = archive_of(tmp_path / "zeros.zip", ("a.dcm", bytes(5 * 2**20)))  # grows a thousand times
    refused(zeros, "unpacks to more than 8 GiB or 100 times its size")
    monkeypatch.setattr(archive, "MAX_BYTES", 2**20)
    noise = os.urandom(2**19 + 1)
    refused(archive_of(tmp_path / "noise.zip", ("a.dcm", noise), ("b.dcm", noise)), "unpacks to more than")


def test_a_bomb_that_states_a_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits apply to the unpacked bytes, whatever the list of entries states."""
    monkeypatch.setattr(archive, "SMALL", 2**20)
    path = archive_of(tmp_path / "scan.zip", ("a.dcm", bytes(5 * 2**20)))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2") + 24
    content[place : place + 4] = struct.pack("<L", 1000)
    path.write_bytes(content)
    refused(path, "cannot be read as a zip archive|unpacks to more than")


def test_damaged_archives(tmp_path: Path) -> None:
    whole = packed(tmp_path / "scan.zip", write_series(tmp_path / "in", scan())).read_bytes()
    path = tmp_path / "damaged.zip"
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read as a zip archive")
    content = bytearray(whole)
    content[len(whole) // 2 : len(whole) // 2 + 20] = bytes(20)
    path.write_bytes(content)
    refused(path, "cannot be read as a zip archive|damaged")
    path.write_text("These are the findings of the report.\n" * 40)
    refused(path, "cannot be read as a zip archive")


def test_names_that_clash(tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("a.dcm/b.dcm")
    refused(archive_of(tmp_path / "scan.zip", ("a.dcm", b"1"), (entry, b"2")), "cannot be unpacked")
    refused(archive_of(tmp_path / "long.zip", ("evil" * 100 + ".dcm", b"1")), "cannot be unpacked")
