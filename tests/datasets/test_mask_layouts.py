"""Masks in each layout, read and prepared: of phantoms, of released data sets, and of a user's own table."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, save_npz

from med3dvlm import VolumeProcessor, read_volume
from med3dvlm.cli import main
from med3dvlm.datasets import ct_rate, m3d, m3d_seg, rex_grounding_ct, table, totalsegmentator
from med3dvlm.datasets.masks import read_masks
from med3dvlm.datasets.phantom import draw_with_masks, read_plans
from med3dvlm.datasets.phantom.ct_rate import KINDS as CHEST_KINDS
from med3dvlm.datasets.phantom.ct_rate import plan_ct_rate, write_ct_rate
from med3dvlm.datasets.phantom.wording import KINDS
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import PairDataset
from med3dvlm.files import read_lines
from med3dvlm.records import Mask

ACROSS = {"right": 1, "left": -1}  # x grows to the patient's right


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chests")
    write_ct_rate(root, 12, seed=1, detail=0.5, workers=1)
    return root


def scan(shape: tuple[int, int, int] = (14, 12, 10)) -> np.ndarray:
    array = np.full(shape, -1000, np.int16)
    array[1:-1, 1:-1, 1:-1] = np.random.default_rng(0).integers(-100, 400, tuple(length - 2 for length in shape))
    return array


def test_masks_of_phantoms_are_where_the_findings_were_drawn(phantoms: Path) -> None:
    plans = {plan.study.id: plan for plan in read_plans(phantoms)}
    checked = 0
    for study in [study for split in m3d.SPLITS for study in m3d.read(phantoms, split)[0]][:12]:
        plan = plans[study.id]
        volume = read_volume(phantoms / study.image)
        masks = {name: voxels for name, voxels, _ in read_masks(phantoms, study.masks, volume)}
        findings = {finding.kind: finding for finding in plan.body.findings}
        drawn = draw_with_masks(plan.body, plan.acquisition)[1]
        assert {name for name, mask in study.masks.items() if mask.kind == "finding"} == {KINDS[kind]["name"] for kind in findings}
        for kind, finding in findings.items():
            about = study.masks[KINDS[kind]["name"]]
            assert np.array_equal(masks[KINDS[kind]["name"]], drawn[kind])
            assert about.text in study.report and about.text and about.place == finding.place and about.organ == KINDS[kind]["organ"]
            if about.side in ACROSS and kind != "liver_mass":  # whose segments are called after the lobes of the liver
                places = np.argwhere(masks[KINDS[kind]["name"]]) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
                assert np.sign(places[:, 0].mean()) == ACROSS[about.side], (kind, finding)
                checked += 1
        for organ, letter in (("left lung", "left"), ("right kidney", "right")):
            if organ in masks:
                places = np.argwhere(masks[organ]) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
                assert study.masks[organ].side == letter and np.sign(places[:, 0].mean()) == ACROSS[letter]
    assert checked >= 8


def test_prepared_phantoms_have_masks(prepared: Path) -> None:
    data = PreparedData(prepared)
    for study in data.studies("train")[:6]:
        masks = data.masks(study)
        assert masks.shape == (len(data.mask_names(study)), 32, 64, 64) and masks.flatten(1).any(dim=1).all()
        bright = data.volume(study)[0].float()
        if "liver" in data.mask_names(study) and "spine" in data.mask_names(study):
            spine, liver = data.masks(study, ["spine", "liver"])
            assert bright[spine].mean() > bright[liver].mean() > bright.mean()


def test_sentences_of_ct_rate_phantoms_have_masks(chests: Path, tmp_path: Path) -> None:
    """Read as CT-RATE, with ReXGroundingCT's own splits, and by the command line."""
    plans = {plan.name: plan for plan in plan_ct_rate(12, seed=1, detail=0.5)}
    assert rex_grounding_ct.splits(chests) == ["train", "validation"]
    grounded = rex_grounding_ct.read(chests, "train")[0]
    plain = ct_rate.read(chests, "train_fixed")[0]
    assert [study.masks for study in grounded] == [study.masks for study in plain] and len(grounded) > 5
    for study in grounded[:5]:
        plan = plans[study.id.rsplit("/", 1)[1]]
        masks = {name: voxels for name, voxels, _ in read_masks(chests, study.masks, read_volume(chests / study.image))}
        for finding in plan.body.findings:
            name = CHEST_KINDS[finding.kind]["name"]
            assert study.masks[name].text in plan.findings
            assert np.array_equal(masks[name], draw_with_masks(plan.body, plan.acquisition)[1][finding.kind])
    options = ["--recipe", "ct_rate", "--size", "20,30,30", "--target-spacing", "14,12,12", "--workers", "1"]
    assert main(["prepare", "rex_grounding_ct", str(chests), str(tmp_path / "store"), *options]) == 0
    data = PreparedData(tmp_path / "store")
    assert "right lung" in data.mask_names(data.studies("validation")[0])


def test_released_sentences(chests: Path, tmp_path: Path) -> None:
    """Without our additions the names are the sentences; a scan without masks, or missing in CT-RATE, is a failure."""
    for name in ("radiology_text_reports", "metadata", "multi_abnormality_labels", "train_fixed", "valid_fixed"):
        (tmp_path / name).symlink_to(chests / name)
    listing = json.loads((chests / "dataset.json").read_text())
    first, second = listing["train"][:2]
    sentences = {"0": "Nodule in the  left lung", "1": "Nodule in the left lung", "2": "Both the left and the right lung"}
    listing = {
        "train": [{"name": first["name"], "findings": sentences}, second, {"name": "train_999_a_1.nii.gz", "findings": {}}],
        "test": listing["val"],
    }
    folder = tmp_path / "ReXGroundingCT"
    (folder / "segmentations").mkdir(parents=True)
    (folder / "segmentations" / first["name"]).symlink_to(chests / "segmentations" / first["name"])
    (folder / "dataset.json").write_text(json.dumps(listing))
    assert rex_grounding_ct.splits(tmp_path) == ["train"]
    failures: list[dict[str, str]] = []
    (study,) = rex_grounding_ct.read(tmp_path, "train", failures)[0]
    assert {name: (mask.channel, mask.side, mask.text) for name, mask in study.masks.items()} == {
        "Nodule in the left lung": (0, "left", "Nodule in the left lung"),
        "Nodule in the left lung (2)": (1, "left", "Nodule in the left lung"),
        "Both the left and the right lung": (2, "", "Both the left and the right lung"),
    }
    assert ["is missing" in failure["reason"] for failure in failures] == [True, False] and "not among" in failures[1]["reason"]
    with pytest.raises(ValueError, match="is missing"):
        rex_grounding_ct.read(tmp_path, "train")
    (folder / "dataset.json").write_text('{"train": [{"name": 4}]}')
    with pytest.raises(ValueError, match=r"entry 1 of 'train' must be \{\"name\": file"):
        rex_grounding_ct.splits(tmp_path)


@pytest.mark.parametrize("release", ["new", "old"])
def test_m3d_seg_as_released(release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are written as the published script does: axes x, y, z, a row for each label, paths of another machine."""
    array = scan()
    liver, tumor = array > 250, array > 380
    rows = np.stack([liver, np.zeros_like(liver), tumor]).astype(np.int32)
    root = tmp_path / "M3D_Seg" / "0020"
    image, label = {
        "new": ("0020/7/image.npy", f"0020/7/mask_{rows.shape}.npz"),
        "old": ("0020/ct/case_7.npy", f"0020/gt/case_7.{rows.shape}.npz"),
    }[release]
    for path in (image, label):
        (tmp_path / "M3D_Seg" / path).parent.mkdir(parents=True, exist_ok=True)
    np.save(tmp_path / "M3D_Seg" / image, (array[None] - 3.0) / 250)
    save_npz(tmp_path / "M3D_Seg" / label, csr_matrix(rows.reshape(3, -1)))
    labels = {"0": "background", "1": "liver", "2": "kidney left", "3": "liver tumour"}
    pairs = [{"image": f"/data/M3D_Seg/{image}", "label": f"/data/M3D_Seg/{label}"}, {"image": "0020/8/image.npy", "label": "0020/8/m.npz"}]
    listing = {"name": "0020 Dataset", "labels": labels, "train": pairs, "test": pairs[:1]}
    if release == "old":
        (tmp_path / "M3D_Seg" / "dataset_info.json").write_text(json.dumps({"0020": list(labels.values())[1:]}))
        del listing["labels"]
    (root / "0020.json").write_text(json.dumps(listing))
    assert m3d_seg.splits(tmp_path) == ["train", "test"] == m3d_seg.splits(tmp_path / "M3D_Seg")
    failures: list[dict[str, str]] = []
    (study,) = m3d_seg.read(tmp_path, "train", failures)[0]
    assert [failure["study"] for failure in failures] == ["0020/8"] and study.id == ("0020/7" if release == "new" else "0020/case_7")
    assert [(name, mask.kind, mask.side) for name, mask in study.masks.items()] == [
        ("liver", "structure", ""), ("kidney left", "structure", "left"), ("liver tumour", "finding", ""),
    ]  # fmt: skip
    volume = read_volume(tmp_path / study.image, **study.reading)
    assert volume.shape == (10, 12, 14)
    found = {name: voxels for name, voxels, _ in read_masks(tmp_path, study.masks, volume)}
    assert np.array_equal(found["liver"], liver.T) and np.array_equal(found["liver tumour"], tumor.T) and not found["kidney left"].any()

    assert main(["prepare", "m3d_seg", str(tmp_path), str(tmp_path / "store"), "--size", "8,10,12", "--workers", "1"]) == 1
    assert "1 of 2 studies could not be prepared" in capsys.readouterr().err
    data = PreparedData(tmp_path / "store", exclude_failures=True)
    (study,) = data.studies("train")
    assert data.mask_names(study) == ["liver", "liver tumour"]
    assert torch.equal(data.masks(study, ["liver"])[0], torch.from_numpy(liver.T[1:-1, 1:-1, 1:-1].copy()))
    assert "some masks hold no voxel of the scan (1: kidney left)." in read_lines(tmp_path / "store" / "warnings.jsonl")[0]["warnings"]
    with pytest.raises(ValueError, match="1 of the 1 studies in .* have no report, the first is 0020"):
        PairDataset(data, "train")


def test_totalsegmentator_as_released(tmp_path: Path) -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    for case in ("s0000", "s0001", "s0002", "s0003"):
        (tmp_path / case / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(scan(), affine), tmp_path / case / "ct.nii.gz")
        for name in ("liver", "lung_upper_lobe_left", "kidney_cyst_right"):
            nib.save(nib.Nifti1Image((scan() > 300).astype(np.uint8), affine), tmp_path / case / "segmentations" / f"{name}.nii.gz")
    (tmp_path / "s0002" / "ct.nii.gz").unlink()
    (tmp_path / "meta.csv").write_text("\ufeffimage_id;age;split\ns0000;40;train\ns0001;50;val\ns0002;;train\n", encoding="utf-8")
    assert totalsegmentator.splits(tmp_path) == ["train", "validation"]
    failures: list[dict[str, str]] = []
    (study,) = totalsegmentator.read(tmp_path, "train", failures)[0]
    assert [failure["study"] for failure in failures] == ["s0002"] and study.id == "s0000"
    assert [(name, mask.kind, mask.side) for name, mask in study.masks.items()] == [
        ("kidney cyst right", "finding", "right"), ("liver", "structure", ""), ("lung upper lobe left", "structure", "left"),
    ]  # fmt: skip
    (found, *_) = read_masks(tmp_path, study.masks, read_volume(tmp_path / study.image))
    assert np.array_equal(found[1], (scan() > 300).T)
    with pytest.raises(FileNotFoundError, match="no case with a folder segmentations"):
        totalsegmentator.splits(tmp_path / "s0000")


def test_masks_of_a_users_table(tmp_path: Path) -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    array = scan()
    (tmp_path / "drawn").mkdir()
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image((array > 300).astype(np.uint8), affine), tmp_path / "drawn" / "left_lung_nodule.nii.gz")
    nib.save(nib.Nifti1Image((array > 300) + (array > 350).astype(np.uint8), affine), tmp_path / "labels.nii.gz")
    head = "image,report,split,Mask: liver mass,masks\n"
    (tmp_path / "table.csv").write_text(head + "a.nii.gz,A mass.,train,labels.nii.gz#2,drawn\nb.nii.gz,None there.,train,,\n")
    first, second = table.read(tmp_path, "train")[0]
    assert first.masks == {
        "left lung nodule": Mask("drawn/left_lung_nodule.nii.gz", side="left"),
        "liver mass": Mask("labels.nii.gz", value=2),
    }
    assert second.masks == {}
    assert main(["prepare", "table", str(tmp_path), str(tmp_path / "store"), "--size", "8,10,12", "--workers", "1"]) == 0
    data = PreparedData(tmp_path / "store")
    expected = (array > 350).T[1:-1, -2:0:-1, -2:0:-1].copy()  # displayed from the front and from the feet
    assert torch.equal(data.masks(data.studies("train")[0], ["liver mass"])[0], torch.from_numpy(expected))
    for cells, said in (
        ("labels.nii.gz#x,", "must be a file, or file#label"),
        (",nowhere", "is not a folder with files in it"),
        ("../m,", "without '..'"),
    ):
        (tmp_path / "table.csv").write_text(head + f"a.nii.gz,A mass.,train,{cells}\n")
        with pytest.raises(ValueError, match=said):
            table.read(tmp_path, "train")


def test_arrays_with_axes_x_y_z_are_transposed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", scan())
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), tmp_path / "a.nii.gz")
    assert np.array_equal(read_volume(tmp_path / "a.npy", transpose=True).array, scan().T)
    with pytest.raises(ValueError, match="transpose is for arrays"):
        read_volume(tmp_path / "a.nii.gz", transpose=True)


def test_masks_of_arrays_with_axes_x_y_z_are_transposed_as_their_scan(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", scan())
    np.save(tmp_path / "mass.npy", (scan() > 350).astype(np.uint8))
    (tmp_path / "table.csv").write_text("image,report,split,orientation,transpose,mask:mass\na.npy,A mass.,train,SAR,1,mass.npy\n")
    assert main(["prepare", "table", str(tmp_path), str(tmp_path / "store"), "--size", "8,10,12", "--workers", "1"]) == 0
    data = PreparedData(tmp_path / "store")
    expected = (scan() > 350).T[1:-1, -2:0:-1, -2:0:-1].copy()  # displayed from the front and from the feet
    assert torch.equal(data.masks(data.studies("train")[0], ["mass"])[0], torch.from_numpy(expected))


def test_data_without_masks_are_prepared_as_before(tmp_path: Path) -> None:
    """None of their lines, records and files mentions masks."""
    nib.save(nib.Nifti1Image(scan(), np.eye(4)), tmp_path / "a.nii.gz")
    (tmp_path / "table.csv").write_text("image,report\na.nii.gz,A mass.\n")
    assert main(["prepare", "table", str(tmp_path), str(tmp_path / "store"), "--size", "8,10,12", "--workers", "1"]) == 0
    texts = [(tmp_path / "store" / name).read_text() for name in ("studies.jsonl", "index.jsonl", "summary.json")]
    assert not any("mask" in text for text in texts)
    data = PreparedData(tmp_path / "store")
    (study,) = [study for split in data.summary["splits"] for study in data.studies(split)]
    assert data.mask_names(study) == [] and data.masks(study).shape == (0, 8, 10, 12)
    assert data.processor.to_dict() == VolumeProcessor("m3d", size=(8, 10, 12)).to_dict()
