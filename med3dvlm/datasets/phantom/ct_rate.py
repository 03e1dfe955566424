"""Chest phantoms in the layout of CT-RATE: patients with one or two scans, scans in one or two reconstructions, the 18 findings as labels,
and masks of the sentences in the layout of ReXGroundingCT.

Every finding is about equally common, 3.6 of them in a scan on average, which is CT-RATE's own average; CT-RATE's frequencies differ by
a factor of six (DCFormer paper, Table 5), and the rare ones would not be learnt from a thousand drawings.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from med3dvlm.datasets import ct_rate, sentence_masks
from med3dvlm.datasets.phantom.anatomy import draw_with_masks
from med3dvlm.datasets.phantom.body import Body, Finding
from med3dvlm.datasets.phantom.canvas import Acquisition
from med3dvlm.datasets.phantom.places import COUNTS, about_finding, about_structures
from med3dvlm.files import atomic_file, write_json
from med3dvlm.reports.findings import FINDINGS_CT_RATE

KINDS: dict[str, dict[str, Any]] = yaml.safe_load(files(__package__).joinpath("ct_rate_findings.yaml").read_text(encoding="utf-8-sig"))
MAX_FINDINGS = 7
DENIALS = ("No {} is observed.", "{} is not present.", "There is no {}.")
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA_COLUMNS = (
    "VolumeName", "Manufacturer", "PatientPosition", "ImageOrientationPatient", "Rows", "Columns", "XYSpacing",
    "RescaleIntercept", "RescaleSlope", "RescaleType", "NumberofSlices", "ZSpacing",
)  # fmt: skip
SUPINE = "[1, 0, 0, 0, 1, 0]"


@dataclass(frozen=True)
class Plan:
    """One volume without its voxels. `name` is as train_1_a_2; raw values are HU minus `intercept`."""

    name: str
    split: str
    findings: str
    impressions: str
    body: Body
    acquisition: Acquisition
    intercept: int


def plan_ct_rate(volumes: int, seed: int = 0, detail: float = 1.0) -> list[Plan]:
    """Plan every volume: 200 or a fifth (the smaller) in `valid`, the rest in `train`; patients are split, not volumes."""
    if volumes < 10:
        raise ValueError(f"a phantom data set needs at least 10 volumes, not {volumes}, to fill its two splits")
    random = np.random.default_rng(seed)
    valid = min(200, volumes // 5)
    given: Counter[str] = Counter()
    plans: list[Plan] = []
    for split, size in (("train", volumes - valid), ("valid", valid)):
        drawn: set[str] = set()
        done = patient = 0
        while done < size:
            patient += 1
            for scan in "ab"[: 1 + (random.random() < 0.1)]:
                body = _body(random, given)
                findings = _findings(body, random)
                while findings in drawn:
                    findings = _findings(body, random)
                drawn.add(findings)
                impressions = _impressions(body)
                intercept = int(random.choice([-1024, -8192]))
                for reconstruction in range(min(1 + (random.random() < 0.2), size - done)):
                    spacing = float(random.uniform(5.0, 6.5)), *(float(random.uniform(3.6, 4.6)),) * 2
                    acquisition = Acquisition("axial", "non-contrast", int(random.integers(2**31)), detail, spacing)
                    name = f"{split}_{patient}_{scan}_{reconstruction + 1}"
                    plans.append(Plan(name, split, findings, impressions, body, acquisition, intercept))
                    done += 1
                if done == size:
                    break
    return plans


def _body(random: np.random.Generator, given: Counter[str]) -> Body:
    """Return a chest with 0 to 7 findings, first those that were given least so far."""
    count = int(random.integers(MAX_FINDINGS + 1))
    kinds = sorted(random.permutation(list(KINDS)).tolist(), key=lambda kind: given[kind] + random.uniform(0, 40))[:count]
    findings = []
    for kind in sorted(kinds, key=list(KINDS).index):
        given[kind] += 1
        facts = KINDS[kind]
        low, high = facts.get("size_mm", (0, 0))
        place, number = str(random.choice(facts["places"])), int(random.integers(1, facts.get("number", 1) + 1))
        findings.append(Finding(kind, place, int(random.integers(low, high + 1)), number))
    return Body("chest", tuple(findings), int(random.integers(2**31)))


def _findings(body: Body, random: np.random.Generator) -> str:
    """Write every finding in a sentence, and four to eight others that are denied, in random order."""
    sentences = []
    for finding in body.findings:
        wording = str(random.choice(KINDS[finding.kind]["present"]))
        sentences.append(wording.format(place=finding.place, size=finding.size_mm, count=COUNTS[finding.count]))
    absent = [kind for kind in KINDS if kind not in {finding.kind for finding in body.findings}]
    for kind in random.permutation(absent)[: random.integers(4, 9)]:
        denial = str(random.choice(DENIALS)).format(KINDS[kind]["name"])
        sentences.append(denial[0].upper() + denial[1:])
    return " ".join(random.permutation(sentences).tolist())


def _impressions(body: Body) -> str:
    names = [KINDS[finding.kind]["name"].capitalize() + "." for finding in body.findings]
    return " ".join(names) or "Normal chest CT."


def write_ct_rate(
    root: str | Path, volumes: int = 800, seed: int = 0, detail: float = 1.0, version: int = 2, workers: int = 2
) -> list[Plan]:
    """Write volumes, reports, metadata, labels and masks under `root`; a volume that is there already is kept, so that a killed run continues.

    Args:
        version: 1 writes raw values under a header without geometry into train and valid; 2 HU with geometry into train_fixed, valid_fixed.

    Raises:
        ValueError: the version is neither, or `root` holds phantoms of other settings or planned by another version of this package.
    """
    if version not in (1, 2):
        raise ValueError(f"CT-RATE has versions 1 (raw values) and 2 (HU), not {version}")
    root = Path(root)
    plans = plan_ct_rate(volumes, seed, detail)
    settings = root / "phantoms.json"
    content = json.dumps([asdict(plan) for plan in plans])
    wanted = {"volumes": volumes, "seed": seed, "detail": detail, "plan": hashlib.sha256(content.encode()).hexdigest()[:16]}
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8-sig")) != wanted:
        raise ValueError(
            f"{root} holds phantoms of other settings or of another version ({settings}), not {wanted}; choose another folder or delete it"
        )
    write_json(settings, wanted)
    with ProcessPoolExecutor(workers) as pool:
        shapes = list(
            tqdm(pool.map(partial(_write_volume, root, version), plans, chunksize=8), total=len(plans), unit="volume", desc="phantoms")
        )
    for short, long in ct_rate.LONG_NAMES.items():
        part = [(plan, shape) for plan, shape in zip(plans, shapes, strict=True) if plan.split == short]
        rows = [
            (_file(plan), "Not given.", "Non-contrast CT of the chest, axial slices.", plan.findings, plan.impressions) for plan, _ in part
        ]
        _write_table(root / "radiology_text_reports" / f"{long}_reports.csv", REPORT_COLUMNS, rows)
        _write_table(root / "metadata" / f"{long}_metadata.csv", METADATA_COLUMNS, [_metadata(plan, shape) for plan, shape in part])
        labels = [(_file(plan), *_labels(plan.body)) for plan, _ in part]
        _write_table(root / "multi_abnormality_labels" / f"{short}_predicted_labels.csv", ("VolumeName", *ct_rate.LABEL_COLUMNS), labels)
    named = {"train": "train", "valid": "val"}
    sentence_masks.write(root, {named[short]: [(plan.name, _about(plan)) for plan in plans if plan.split == short] for short in named})
    return plans


def _about(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the facts about a volume's masks, in the order of their channels."""
    found = {KINDS[finding.kind]["name"]: about_finding(finding, KINDS[finding.kind], plan.findings) for finding in plan.body.findings}
    return found | about_structures(plan.body.region)


def _labels(body: Body) -> list[int]:
    present = {finding.kind for finding in body.findings}
    return [int(kind in present) for kind in FINDINGS_CT_RATE]


def _file(plan: Plan) -> str:
    return f"{plan.name}.nii.gz"


def _metadata(plan: Plan, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    depth, rows, columns = shape
    between, across = (round(mm / plan.acquisition.detail, 6) for mm in (plan.acquisition.spacing or ())[:2])
    spacing = f"[{across}, {across}]"
    return (_file(plan), "phantom", "HFS", SUPINE, rows, columns, spacing, plan.intercept, 1, "HU", depth, between)


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def _write_volume(root: Path, version: int, plan: Plan) -> tuple[int, int, int]:
    """Write the volume and return its (D, H, W)."""
    import nibabel as nib

    scan = plan.name.rsplit("_", 1)[0]
    path = root / (plan.split + ("_fixed" if version == 2 else "")) / scan.rsplit("_", 1)[0] / scan / _file(plan)
    masks = root / sentence_masks.FOLDER / _file(plan)
    if path.exists() and masks.exists():
        columns, rows, depth = nib.load(path).shape  # type: ignore[attr-defined]
        return depth, rows, columns
    canvas, found = draw_with_masks(plan.body, plan.acquisition)
    affine = np.eye(4)
    if version == 2:
        affine[:3, :3] = canvas.directions[:, ::-1]
        affine[:3, 3] = canvas.corner
    named = {KINDS[kind]["name"]: mask for kind, mask in found.items()} | canvas.structures()
    drawn = np.stack([named[name].transpose(2, 1, 0) for name in _about(plan)]).astype(np.uint8)  # (F, x, y, z)
    values = canvas.array.astype(np.int16).transpose(2, 1, 0)  # a NIfTI counts columns first: left, posterior, superior
    for place, array in ((masks, drawn), (path, values if version == 2 else values - np.int16(plan.intercept))):
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            aside = place.with_name("part-" + place.name)
            nib.save(nib.Nifti1Image(array, affine), aside)
            aside.replace(place)
    return canvas.array.shape
