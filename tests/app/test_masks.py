"""Findings drawn on the scan: what the browser gets, what the list and the contours show, what is saved. The segmenter is a stand-in."""

import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import nibabel
import numpy as np
import pydicom
import pytest

from med3dvlm.app import chat as app
from med3dvlm.app.analysis import Analysis, find_segmenter, load
from med3dvlm.app.masks import MAX_MASKS, Mask, names_to_segment, pack, stated
from med3dvlm.app.page import build
from med3dvlm.app.scans import OpenScan, example, opened
from med3dvlm.app.session import Session
from med3dvlm.app.viewer import picture
from med3dvlm.app.workstation import Workstation
from med3dvlm.checkpoints import load_clip
from med3dvlm.inference.segmentation import Segmentation, Segmenter
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.volume import Volume, read_volume
from tests.formats.dicom_files import scan as values
from tests.formats.dicom_files import write_series

from .browsing import ask, expect, upload, wait_for
from .browsing import opened as shown_on
from .conftest import Parrot
from .test_page import PALE

BOX = (slice(2, 5), slice(4, 10), slice(6, 16))  # of the stand-in's masks along D, H, W


def segment(volume: Volume, names: Sequence[str]) -> list[Segmentation]:
    """Finds a box with a hole for every name, but nothing for names that contain "absent"."""
    found = []
    for name in names:
        mask = np.zeros(volume.shape, bool)
        if "absent" not in name:
            mask[BOX] = True
            mask[3, 6, 9] = False
        found.append(Segmentation.of(name, mask, 0.12 if "absent" in name else 0.9, volume))
    return found


@pytest.fixture
def session() -> Session:
    session = Session()
    session.open(example("Chest phantom"))
    return session


@pytest.fixture
def workstation() -> Workstation:
    return Workstation(Parrot(), "parrot", analysis=Analysis(segment=segment))


@pytest.mark.parametrize("letters", ["SAR", "IPL", "LAS", "PIR"])
@pytest.mark.parametrize("max_voxels", [10**9, 1200])
def test_the_browsers_voxels_are_the_masks(letters: str, max_voxels: int) -> None:
    """The mask is unpacked, reoriented and coarsened by plain loops."""
    rng = np.random.default_rng(3)
    volume = Volume(rng.integers(-900, 900, (9, 21, 31)).astype(np.int16), (2.5, 1.0, 0.7), letters, None, "HU", source="scan")
    scan = replace(opened(volume, "NIfTI"), picture=picture(volume, max_voxels))
    assert (scan.picture.block > 1) == (max_voxels == 1200)
    mask = np.zeros(volume.shape, bool)
    mask[2:5, 4:11, 6:17] = rng.random((3, 7, 11)) > 0.4
    packed = pack(Segmentation.of("lung nodule", mask, 0.9, volume), scan)
    np.testing.assert_array_equal(packed.unpacked(volume.shape).mask, mask)

    facts = packed.facts
    found = np.zeros(scan.picture.stored.shape, bool)
    depth, height, width = facts["shape"]
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                place = (z * height + y) * width + x
                inside = packed.bits[place >> 3] >> (place & 7) & 1
                found[facts["origin"][0] + z, facts["origin"][1] + y, facts["origin"][2] + x] = inside
    # the mask as a picture of its own, of which a voxel is above 0 where any of its block is
    as_picture = replace(volume, array=mask.astype(np.int16) * 1000)
    expected = picture(as_picture, max_voxels).stored > 0
    np.testing.assert_array_equal(found, expected)
    assert found[tuple(facts["target"])]


def test_the_planes_go_into_the_largest_part() -> None:
    volume = Volume(np.arange(7200, dtype=np.int16).reshape(12, 20, 30), (1.0, 1.0, 1.0), "IPL", None, "HU", source="scan")
    mask = np.zeros(volume.shape, bool)
    mask[1, 1, 1] = True
    mask[4:9, 5:14, 5:16] = True
    mask[5:8, 7:12, 7:14] = False  # a shell, whose middle is not in it
    target = pack(Segmentation.of("x", mask, 1.0, volume), opened(volume, "NIfTI")).facts["target"]
    assert mask[tuple(target)] and target != [1, 1, 1]


def test_findings_of_the_report_or_a_phrase_are_segmented(workstation: Workstation, session: Session) -> None:
    with pytest.raises(ValueError, match="states no finding"):
        workstation.segment(session, " ")
    session.report = "Findings: A lung nodule on the right. No pleural effusion. Possible atelectasis."
    workstation.segment(session, "")
    assert [mask.found.name for mask in session.masks.values()] == ["lung nodule", "atelectasis"]
    workstation.segment(session, "  absent   liver mass ")
    workstation.segment(session, "LUNG nodule")  # in place of the one before
    assert [mask.found.name for mask in session.masks.values()] == ["atelectasis", "absent liver mass", "LUNG nodule"]
    data = workstation.viewer_data(session)
    assert data["target"] == data["masks"][-1]["number"] == 4
    reference = segment(session.scan.volume, ["x"])[0]
    words = data["masks"][0]["measurements"]
    assert f"longest diameter {reference.longest_diameter_mm:.0f} mm" in words and f"{reference.volume_ml:.1f} ml" in words
    assert reference.side and reference.side in words
    assert [mask["found"] for mask in data["masks"]] == [True, False, True]
    with pytest.raises(ValueError, match="at most 200"):
        workstation.segment(session, "x" * 201)
    for number in range(MAX_MASKS - 3):
        workstation.segment(session, f"finding {number}")
    with pytest.raises(ValueError, match=f"At most {MAX_MASKS}"):
        workstation.segment(session, "one more")
    workstation.remove_mask(session, 2)
    assert 2 not in session.masks
    session.open(example("Abdomen phantom"))
    assert session.masks == {} and session.target is None


def test_masks_of_the_previous_scan_are_removed(workstation: Workstation, session: Session) -> None:
    old = session.scan

    def slow(volume: Volume, names: Sequence[str]) -> list[Segmentation]:
        session.open(example("Abdomen phantom"))
        return segment(volume, names)

    workstation.analysis = Analysis(segment=slow)
    workstation.segment(session, "lung nodule")
    assert session.scan is not old and session.masks == {} and session.target is None


def test_findings_stated_in_an_answer_can_be_segmented() -> None:
    answer = "🙂 There is a lung nodule. No pleural effusion, possible atelectasis."
    assert [[answer[start:end], name] for start, end, name in stated(answer)] == [
        ["nodule", "lung nodule"],
        ["atelectasis", "atelectasis"],
    ]
    with pytest.raises(ValueError, match="states no finding"):
        names_to_segment("", "No pleural effusion.")


def test_saved_masks_lie_on_the_scan(workstation: Workstation, session: Session, scan: Any, tmp_path: Path) -> None:
    workstation.open_uploads(session, [str(shutil.copy(scan(), tmp_path))])
    with pytest.raises(ValueError, match="No mask was drawn"):
        workstation.save_masks(session, "zip")
    for name in ("lung nodule", "Ä/..", "absent"):
        workstation.segment(session, name)
    with zipfile.ZipFile(io.BytesIO(workstation.save_masks(session, "zip"))) as archive:
        assert archive.namelist() == ["01_lung_nodule.nii.gz", "02_mask.nii.gz", "measurements.json"]
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read("01_lung_nodule.nii.gz")))
        about = json.loads(archive.read("measurements.json"))
    wanted = segment(session.scan.volume, ["x"])[0]
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose() > 0, wanted.mask)
    np.testing.assert_allclose(image.affine, np.diag([1.0, 1.0, 2.5, 1.0]))
    assert about["findings"][0]["volume_ml"] == wanted.volume_ml and "not a medical device" in about["notice"]
    with pytest.raises(ValueError, match="not DICOM"):
        workstation.save_masks(session, "dcm")


def test_masks_of_a_dicom_scan_become_a_dicom_segmentation(workstation: Workstation, session: Session, tmp_path: Path) -> None:
    frame = pydicom.uid.generate_uid()
    folder = write_series(tmp_path / "series", values(), edit=lambda item, _: setattr(item, "FrameOfReferenceUID", frame))
    workstation.open_uploads(session, [str(file) for file in folder.iterdir()])
    workstation.segment(session, "lung nodule")
    saved = pydicom.dcmread(io.BytesIO(workstation.save_masks(session, "dcm")))
    assert saved.Modality == "SEG" and saved.SegmentSequence[0].SegmentLabel == "lung nodule"
    assert saved.pixel_array.sum() == 3 * 6 * 10 - 1
    session.scan = replace(session.scan, resampled=True)
    with pytest.raises(ValueError, match="straightened"):
        workstation.save_masks(session, "dcm")


def test_the_segmenter_is_found_within_or_beside_the_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "segmenter").mkdir(parents=True)
    assert find_segmenter(model) is None
    beside = tmp_path / "segmentation"
    beside.mkdir()
    (beside / "config.json").write_text("{}")
    assert find_segmenter(model) == beside
    (model / "segmenter" / "config.json").write_text("{}")
    assert find_segmenter(model) == model / "segmenter"


def test_a_segmenter_replaces_the_saliency_overlay(tmp_path: Path, tiny_models: SimpleNamespace, session: Session) -> None:
    clip, processor = load_clip(tiny_models.clip)
    model = Med3DSegmenter.from_clip(clip, decoder_widths=[8, 4, 8, 8], embedding_dim=5, attention_heads=2).eval()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "segmenter")
    analysis = load(Parrot(), tiny_models.clip, None, tmp_path / "segmenter")
    assert analysis.explain is analysis.find is None
    workstation = Workstation(Parrot(), "parrot", analysis=analysis)
    workstation.segment(session, "liver mass")
    (mask,) = session.masks.values()
    wanted = Segmenter.from_pretrained(tmp_path / "segmenter").segment(session.scan.volume, "liver mass")
    np.testing.assert_array_equal(mask.unpacked(session.scan.volume.shape).mask, wanted.mask)
    assert mask.found.score == pytest.approx(wanted.score)
    with pytest.raises((ValueError, FileNotFoundError), match="med3d_clip"):
        load(Parrot(), None, None, Path(tiny_models.clip))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        workstation = Workstation(Parrot(), "parrot", max_bytes=2**20, analysis=Analysis(segment=segment))
        blocks = build(workstation)
        yield SimpleNamespace(address=app.launch(blocks, workstation), workstation=workstation)
        blocks.close(verbose=False)


def place(page: Any) -> list[int]:
    return [int(number) for number in (page.locator("#viewer [data-at]").get_attribute("data-at") or "").split(",")]


def coloured(page: Any, plane: str) -> int:
    """Counts the pixels of a plane's canvas that have the first mask's colour."""
    return page.evaluate(
        """plane => { const canvas = document.querySelector(`[data-plane=${plane}] canvas`);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += Math.abs(data[i] - 255) + Math.abs(data[i + 1] - 93)
          + Math.abs(data[i + 2] - 115) < 12;
        return count }""",
        plane,
    )


def test_contours_are_drawn_and_toggled_and_the_viewer_moves_to_them(visit: Any, server: SimpleNamespace, scan: Any) -> None:
    page = visit()
    button = page.get_by_role("button", name="Find findings")
    expect(button).to_be_disabled()
    shown_on(page, scan())
    assert button.get_attribute("title") == "Type a finding, or draft the report first"
    assert page.get_by_role("button", name="Where did it look?").count() == 0
    page.get_by_label("A finding to look for").fill("lung nodule")
    button.click()
    row = page.locator(".findings li").first
    reference = segment(read_volume(scan()), ["x"])[0]
    expect(row).to_contain_text(f"1: lung nodule, longest diameter {reference.longest_diameter_mm:.0f} mm, {reference.volume_ml:.2f} ml, ")
    wait_for(lambda: place(page)[0] == 9 - 3)  # the middle of the box; slices run from feet to head, on the screen from head to feet
    for plane in ("axial", "coronal", "sagittal"):
        wait_for(lambda plane=plane: coloured(page, plane) > 50)
    box = page.get_by_label("Contour of lung nodule", exact=True)
    box.focus()
    page.keyboard.press("Space")
    wait_for(lambda: coloured(page, "axial") == 0)
    page.locator("[data-plane=axial]").press("v")
    wait_for(lambda: coloured(page, "axial") > 50)
    expect(box).to_be_checked()
    page.locator("[data-plane=axial]").press("Home")
    wait_for(lambda: place(page)[0] == 0 and coloured(page, "axial") == 0)
    row.locator(".go").focus()
    page.keyboard.press("Enter")
    wait_for(lambda: place(page)[0] == 6 and coloured(page, "axial") > 50)
    expect(page.locator(".findings .spoken")).to_contain_text("The planes show lung nodule: axial 7")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save masks: NIfTI").click()
    assert zipfile.ZipFile(download.value.path()).namelist() == ["01_lung_nodule.nii.gz", "measurements.json"]
    page.get_by_label("A finding to look for").fill("absent mass")
    page.get_by_label("A finding to look for").press("Enter")
    expect(page.get_by_label("A finding to look for")).to_have_value("")
    expect(page.locator(".findings .missing")).to_have_text("2: absent mass, not drawn (probability of being present: 12 %)")
    assert not page.evaluate(PALE)
    page.get_by_role("button", name="Remove lung nodule").click()
    expect(page.locator(".findings li")).to_have_count(1)
    wait_for(lambda: coloured(page, "axial") == 0)
    page.get_by_role("button", name="Chest phantom").click()
    expect(page.locator(".findings")).to_be_hidden()


def test_clicking_a_finding_moves_the_viewer_to_it(visit: Any, server: SimpleNamespace, scan: Any) -> None:
    page = visit()
    shown_on(page, scan())
    ask(page, "Describe the findings.")
    page.locator(".answered").get_by_role("button", name="nodule", exact=True).first.click()
    expect(page.locator(".findings li")).to_have_count(1)
    wait_for(lambda: place(page)[0] == 6)
    page.locator("[data-plane=axial]").press("Home")
    wait_for(lambda: place(page)[0] == 0)
    page.get_by_role("tab", name="Report").click()
    page.locator("#draft").click()
    chip = page.locator(".reading button.chip.present")
    expect(chip).to_have_text("lung nodule")
    assert page.locator(".reading button.chip.absent").count() == 0
    chip.click()
    wait_for(lambda: place(page)[0] == 6)
    expect(page.locator(".findings li")).to_have_count(1)  # known already
    page.get_by_role("button", name="Find findings").click()
    wait_for(lambda: (page.locator(".findings li").get_attribute("data-number") or "") == "2")
    upload(page, scan(12))
    expect(page.locator(".findings")).to_be_hidden()


def test_masks_are_given_to_their_own_page_alone(server: SimpleNamespace) -> None:
    session = server.workstation.sessions.get("somebody")
    session.open(example("Chest phantom"))
    server.workstation.segment(session, "lung nodule")
    (mask,) = session.masks.values()
    assert isinstance(mask, Mask) and isinstance(session.scan, OpenScan)
    answer = httpx.get(f"{server.address}workstation/{session.token}/mask/1")
    assert answer.content == mask.bits and answer.headers["cache-control"] == "no-store"
    for wrong in (f"{session.token}/mask/2", "x/mask/1", "x/masks/zip", f"{session.token}/masks/exe"):
        assert httpx.get(f"{server.address}workstation/{wrong}").status_code == 404
    server.workstation.sessions.close("somebody")
    assert httpx.get(f"{server.address}workstation/{session.token}/mask/1").status_code == 404


def test_masks_of_a_pointing_answer_are_shown_in_the_viewer(session: Session) -> None:
    """They are drawn once for each answer; those of an answer about another scan are not drawn."""

    class Pointing(Parrot):
        def stream(self, *given: Any, **sampling: Any) -> Any:
            return replace((yield from super().stream(*given, **sampling)), places=("A nodule.", "absent"))

        def masks(self, volume: Volume, places: Sequence[str]) -> list[Segmentation]:
            return segment(volume, places)

    workstation = Workstation(Pointing(), analysis=Analysis())
    assert not workstation.show_places(session)
    session.ask("Where?")
    assert list(workstation.answer(session))[-1].state == "done"
    assert workstation.show_places(session) and not workstation.show_places(session)
    shown = workstation.viewer_data(session)
    assert [(mask["name"], mask["found"]) for mask in shown["masks"]] == [("A nodule.", True), ("absent", False)] and shown["target"] == 1
    assert session.scan is not None
    np.testing.assert_array_equal(session.masks[1].unpacked(session.scan.volume.shape).mask, segment(session.scan.volume, ["x"])[0].mask)
    list(workstation.draft_report(session))
    assert workstation.show_places(session) and session.masks_made == 4 and len(session.masks) == 2
    session.ask("And now?")
    list(workstation.answer(session))
    session.open(example("Abdomen phantom"))
    assert not workstation.show_places(session) and not session.masks
