"""Masks from words on the grid of the stored scan, drawn by a stand-in for the model; `med3dvlm segment`."""

import gzip
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from med3dvlm import Med3DChat, VolumeProcessor, cli, read_volume
from med3dvlm.checkpoints import load_clip
from med3dvlm.cli.segment import _files, line_of
from med3dvlm.geometry.measurements import volume_ml
from med3dvlm.inference.segmentation import PRESENCE, PRESENCE_WHERE_STATED, THRESHOLD, Segmentation, Segmenter
from med3dvlm.models.segmentation import Med3DSegmenter
from med3dvlm.prompts import RESEARCH_NOTICE
from tests.formats.dicom_files import write_series

SHAPE = (20, 30, 40)
WORDS = ("bright spot", "dark spot", "nothing at all")


class Drawer(torch.nn.Module):
    """Draws the bright box for the first of WORDS and the dark voxels for the second, with certainty, and nothing for the third."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        assert input_ids.shape[0] == pixel_values.shape[0] == 1 and input_ids.shape == attention_mask.shape
        drawn = {
            0: (pixel_values[0, 0] - 0.735) * 200,
            1: (0.285 - pixel_values[0, 0]) * 200,
            2: torch.full_like(pixel_values[0, 0], 9.0),
        }
        asked = [int(row[0]) for row in input_ids[0]]
        presence = torch.tensor([[-3.0 if number == 2 else 3.0 for number in asked]])
        return SimpleNamespace(logits=torch.stack([drawn[number] for number in asked])[None], presence=presence)


class Processor:
    """A VolumeProcessor with a tokenizer that gives each of WORDS a number."""

    image_processor = VolumeProcessor("hu_window", size=(36, 48, 64), resize="trilinear")

    def __call__(self, volumes: Any = None, text: list[str] | None = None) -> Any:
        if text is None:
            return self.image_processor(volumes)
        ids = torch.tensor([[WORDS.index(one), 7] for one in text])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def scan() -> np.ndarray:
    """Return a body with a bright box of 4 x 6 x 8 voxels on the patient's left and a dark one of 3 x 4 x 4; axes S, P, L."""
    array = np.full(SHAPE, -1000, np.int16)
    array[1:-1, 3:-3, 4:-4] = 40
    array[8:12, 12:18, 24:32] = 900
    array[3:6, 5:9, 8:12] = -900
    return array


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    made = Segmenter(Drawer(), Processor())
    monkeypatch.setattr(Segmenter, "from_pretrained", classmethod(lambda cls, path, device=None: made))
    return made


@pytest.fixture
def nifti(tmp_path: Path) -> Path:
    affine = np.array([[-1.1, 0.2, 0, 30], [-0.1, -1.3, 0.3, 40], [0, 0.2, 2.4, -50], [0, 0, 0, 1]])  # oblique; x to L, y to P, z to S
    u, _, v = np.linalg.svd(affine[:3, :3])
    affine[:3, :3] = u @ v * (1.1, 1.3, 2.4)  # at right angles
    nibabel.save(nibabel.Nifti1Image(scan().transpose(), affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_mask_is_on_the_scan_and_measured(segmenter: Segmenter, nifti: Path) -> None:
    found = segmenter.segment(nifti, "bright spot")
    wanted = scan() == 900
    both = (found.mask & wanted).sum()
    assert found.found and found.mask.shape == SHAPE and 2 * both / (found.mask.sum() + wanted.sum()) > 0.8
    inner = np.zeros(SHAPE, bool)
    inner[9:11, 13:17, 25:31] = True
    outer = np.zeros(SHAPE, bool)
    outer[7:13, 11:19, 23:33] = True
    assert found.mask[inner].all() and not found.mask[~outer].any()  # within a voxel
    volume = read_volume(nifti)
    assert found.score == pytest.approx(float(torch.sigmoid(torch.tensor(3.0)))) and found.side == "left"
    assert (
        found.volume_ml
        == pytest.approx(volume_ml(found.mask, volume.voxel_positions))
        == pytest.approx(found.mask.sum() * 1.1 * 1.3 * 2.4 / 1000)
    )
    voxels = np.argwhere(found.mask)
    assert found.bounding_box == (tuple(voxels.min(axis=0)), tuple(voxels.max(axis=0) + 1))
    middles = nibabel.affines.apply_affine(nibabel.load(nifti).affine, voxels[:, ::-1])
    low, high = found.bounding_box_mm
    assert (middles.min(axis=0) > low).all() and (middles.max(axis=0) < high).all()
    assert np.ptp(middles, axis=0).max() < found.longest_diameter_mm < np.linalg.norm(np.array(high) - low)
    (part,) = found.components(volume)
    np.testing.assert_array_equal(part.mask, found.mask)


def test_several_texts_and_what_is_absent(segmenter: Segmenter, nifti: Path) -> None:
    """Several texts give the masks of single ones; an unlikely finding has an empty mask."""
    together = segmenter.segment_all(nifti, WORDS)
    for text, one in zip(WORDS, together, strict=True):
        alone = segmenter.segment(nifti, text)
        np.testing.assert_array_equal(one.mask, alone.mask)
        assert (one.name, one.score, one.side, one.volume_ml) == (text, alone.score, alone.side, alone.volume_ml)
    bright, dark, absent = together
    assert bright.side == "left" and dark.mask.any()
    assert not absent.found and absent.volume_ml == 0 and absent.side is None and absent.bounding_box_mm is None and absent.score < 0.5
    for threshold in (0.2, 0.7):
        likely, _ = segmenter.probabilities(segmenter.processor(read_volume(nifti))["pixel_values"], ["bright spot"])
        plain = (segmenter.processor.image_processor.to_scan(likely[0], read_volume(nifti)) > threshold).numpy()
        np.testing.assert_array_equal(segmenter.segment(nifti, "bright spot", threshold).mask, plain)
    for shift, found in ((-1e-4, True), (1e-4, False)):
        one = segmenter.segment(nifti, "bright spot", presence=bright.score + shift)
        assert one.found == found and one.score == bright.score and (not found or (one.mask == bright.mask).all())


def test_a_scan_without_geometry_has_a_mask_without_measurements(segmenter: Segmenter, tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan())
    found = segmenter.segment(read_volume(tmp_path / "scan.npy", unit="HU"), "bright spot")
    assert found.found and found.volume_ml is found.longest_diameter_mm is found.side is found.bounding_box_mm is None
    found.save_nifti(tmp_path / "mask.nii")
    image = nibabel.load(tmp_path / "mask.nii")
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(), found.mask)
    assert image.header["sform_code"] == image.header["qform_code"] == 0


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_saved_mask_overlays_its_scan_for_nibabel_and_itk(segmenter: Segmenter, nifti: Path, tmp_path: Path, ending: str) -> None:
    found = segmenter.segment(nifti, "bright spot")
    path = tmp_path / f"mask{ending}"
    found.save_nifti(path)
    image, source = nibabel.load(path), nibabel.load(nifti)
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), source.affine, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(image.dataobj), found.mask.transpose())
    assert set(np.unique(image.dataobj)) == {0, 1} and image.header.get_xyzt_units()[0] == "mm"
    mask, picture = sitk.ReadImage(str(path)), sitk.ReadImage(str(nifti))
    for index in ((0, 0, 0), (5, 7, 11)):
        np.testing.assert_allclose(mask.TransformIndexToPhysicalPoint(index), picture.TransformIndexToPhysicalPoint(index), atol=1e-3)
    found.save_nifti(tmp_path / f"again{ending}")
    assert path.read_bytes() == (tmp_path / f"again{ending}").read_bytes()  # no time, no name in it
    if ending == ".nii.gz":
        assert gzip.decompress(path.read_bytes())[344:348] == b"n+1\0"
    with pytest.raises(ValueError, match="must end in .nii or .nii.gz"):
        found.save_nifti(tmp_path / "mask.png")


def test_wrong_input(segmenter: Segmenter, nifti: Path) -> None:
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: segmenter.segment(nifti, " "), "The text is empty"),
        (lambda: segmenter.segment_all(nifti, []), "The text is empty"),
        (lambda: segmenter.segment(nifti, "bright spot", 1.0), "threshold is 1 but"),
        (lambda: segmenter.segment(nifti, "bright spot", presence=0.0), "presence is 0 but"),
        (lambda: segmenter.segment(torch.zeros(36, 48, 64), "bright spot"), "give a path or a Volume"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command(segmenter: Segmenter, nifti: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Segmentation] = segmenter.segment_all(nifti, WORDS)
    code, out, error = run(capsys, "segment", "model", nifti, *WORDS, "--out", tmp_path / "mask.nii.gz")
    assert code == 0 and RESEARCH_NOTICE in error
    lines = out.splitlines()
    assert len(lines) == 3 and lines[2] == "nothing at all: presence 0.05, nothing drawn."
    assert lines[0].startswith(f"bright spot: presence 0.95, {found[0].volume_ml:.3g} ml, longest diameter ")
    assert "on the left" in lines[0] and "voxels D 8-11" in lines[0]
    for text, one in zip(WORDS, found, strict=True):
        image = nibabel.load(tmp_path / f"mask-{text.replace(' ', '-')}.nii.gz")
        np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(), one.mask)
    code, _, _ = run(capsys, "segment", "model", nifti, "bright spot", "--out", tmp_path / "one.nii")
    assert code == 0 and (tmp_path / "one.nii").is_file()


def test_the_command_writes_dicom(segmenter: Segmenter, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pydicom.uid.generate_uid()
    write_series(tmp_path / "series", scan(), edit=lambda item, _: setattr(item, "FrameOfReferenceUID", frame))
    out = tmp_path / "seg.dcm"
    code, _, error = run(capsys, "segment", "model", tmp_path / "series", *WORDS, "--dicom-seg", out)
    assert code == 0, error
    found = [one for one in segmenter.segment_all(tmp_path / "series", WORDS) if one.found]
    written = pydicom.dcmread(out)
    assert [item.SegmentLabel for item in written.SegmentSequence] == [one.name for one in found]
    assert int(written.pixel_array.sum()) == sum(int(one.mask.sum()) for one in found)
    code, _, error = run(capsys, "segment", "model", tmp_path / "series", WORDS[2], "--dicom-seg", tmp_path / "none.dcm")
    assert code == 0 and "Nothing was found" in error and not (tmp_path / "none.dcm").exists()


def test_the_commands_defaults_are_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    """The command states them anew: to import them would import torch."""
    with pytest.raises(SystemExit):
        cli.main(["segment", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert re.findall(r"--(threshold|presence) P (?:(?!--).)*\(default: (\S+)\)", words) == [
        ("threshold", f"{THRESHOLD}"), ("presence", f"{PRESENCE}")
    ]  # fmt: skip
    assert signature(line_of).parameters["presence"].default == PRESENCE_WHERE_STATED


def test_masks_are_named_after_texts_of_any_script() -> None:
    files = _files(Path("many.nii.gz"), ["Liver mass!", "\u6e17\u51fa", "lung_nodule 2"])
    assert [file.name for file in files] == ["many-liver-mass.nii.gz", "many-\u6e17\u51fa.nii.gz", "many-lung-nodule-2.nii.gz"]


def test_an_empty_mask_says_why() -> None:
    empty = SimpleNamespace(name="liver mass", score=0.6, bounding_box=None)
    assert line_of(empty, 0.75) == "liver mass: presence 0.60, nothing drawn."  # type: ignore[arg-type]
    assert line_of(empty, 0.5) == "liver mass: presence 0.60, no voxel above the threshold."  # type: ignore[arg-type]


def test_wrong_arguments_of_the_command(segmenter: Segmenter, nifti: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["bright spot", "--out", tmp_path / "mask.png"], "must end in .nii"),
        (["bright spot", "Bright-spot", "--out", tmp_path / "mask.nii"], "into one file"),
        (["bright spot", "--dicom-seg", tmp_path / "seg.dcm"], "was not DICOM"),
        (["bright spot", "--threshold", "0"], "threshold is 0"),
        (["bright spot", "--presence", "1"], "presence is 1"),
    ):
        code, out, error = run(capsys, "segment", "model", nifti, *arguments)
        assert code == 2 and not out and words in error and len([line for line in error.splitlines() if line.startswith("med3dvlm:")]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scan.nii.gz"]


def test_masks_of_tilted_scans_lie_on_the_stored_slices(
    segmenter: Segmenter, nifti: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--straighten` straightens the model's input only."""
    affine = nibabel.load(nifti).affine.copy()
    affine[:3, 2] += 0.3 * affine[:3, 1]
    image = nibabel.Nifti1Image(scan().transpose(), affine)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "tilted.nii.gz")
    code, _, error = run(capsys, "segment", "model", tmp_path / "tilted.nii.gz", "bright spot", "--straighten", "--out", tmp_path / "m.nii")
    assert code == 0, error
    assert segmenter.processor.image_processor.straighten
    mask = np.asarray(nibabel.load(tmp_path / "m.nii").dataobj).transpose().astype(bool)
    wanted = scan() == 900
    assert mask.shape == SHAPE and 2 * (mask & wanted).sum() / (mask.sum() + wanted.sum()) > 0.75


def test_another_model_is_refused(tmp_path: Path, tiny_models: SimpleNamespace, nifti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "segment", tiny_models.clip, nifti, "liver")
    assert code == 2 and "holds a model of type med3d_clip, not med3d_segmenter" in error
    code, _, error = run(capsys, "segment", tmp_path / "gone", nifti, "liver")
    assert code == 2 and "is not a directory" in error


def test_with_a_real_segmenter(tmp_path: Path, tiny_models: SimpleNamespace, nifti: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded from its folder, the mask is where the model's logits, mapped to the scan, are above 0; command and chat give the same."""
    clip, processor = load_clip(tiny_models.clip)
    torch.manual_seed(3)
    model = Med3DSegmenter.from_clip(clip, decoder_widths=[8, 4, 8, 8], embedding_dim=5, attention_heads=2).eval()
    with torch.no_grad():
        model.head.bias.fill_(0.0)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "segmenter")
    segmenter, volume = Segmenter.from_pretrained(tmp_path / "segmenter", "cpu"), read_volume(nifti)
    coded = processor.tokenizer("liver mass", return_tensors="pt")
    with torch.no_grad():
        output = model(processor(volume)["pixel_values"], coded["input_ids"][None], coded["attention_mask"][None])
    found = segmenter.segment(volume, "liver mass")
    assert found.score == pytest.approx(float(output.presence.sigmoid()), abs=1e-5)
    wanted = (processor.image_processor.to_scan(output.logits[0, 0].sigmoid(), volume) > 0.5).numpy() & (found.score > 0.5)
    assert (found.mask != wanted).mean() < 1e-3  # but for rounding at the threshold
    chat = Med3DChat.from_pretrained(tiny_models.vlm, "cpu", segmenter=tmp_path / "segmenter")
    np.testing.assert_array_equal(chat.segment(nifti, "liver mass").mask, found.mask)
    with pytest.raises(ValueError, match="Masks need a segmenter"):
        Med3DChat.from_pretrained(tiny_models.vlm, "cpu").segment(nifti, "liver mass")
    code, out, _ = run(capsys, "segment", tmp_path / "segmenter", nifti, "liver mass")
    assert code == 0 and out.startswith(f"liver mass: presence {found.score:.2f}")
