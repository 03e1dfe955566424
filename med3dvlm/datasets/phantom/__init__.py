"""CT phantoms with reports, questions, labels and masks, written in the layouts of M3D-Cap, M3D-VQA and M3D-Seg: the embedded default of
demo and tests.

A patient has one body and one or two series of it (plane, phase); patients are split, not series. No two studies share a report.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from med3dvlm.datasets import m3d, m3d_seg
from med3dvlm.datasets.phantom.anatomy import REGIONS, draw, draw_with_masks
from med3dvlm.datasets.phantom.body import PHASES, Body, Finding
from med3dvlm.datasets.phantom.canvas import Acquisition
from med3dvlm.datasets.phantom.places import STRUCTURES, about_finding, about_structures
from med3dvlm.datasets.phantom.wording import KINDS, Questioner, kinds_of, write_report
from med3dvlm.files import write_json
from med3dvlm.records import Mask, Question, Study

__all__ = ["Acquisition", "Body", "Finding", "Plan", "draw", "draw_with_masks", "plan_phantoms", "read_plans", "write_phantoms"]

SETTINGS_FILE = "phantoms.json"
LABELS = [*(facts["name"] for facts in KINDS.values()), *dict.fromkeys(name for names in STRUCTURES.values() for name in names)]  # of masks
FINDING_COUNTS = (0.04, 0.14, 0.24, 0.28, 0.20, 0.10)  # probability of 0, 1, 2, ... findings
PLANE_SHARES = {"axial": 0.58, "coronal": 0.14, "sagittal": 0.14, "oblique": 0.14}


@dataclass(frozen=True)
class Plan:
    """One study without its voxels."""

    study: Study
    questions: tuple[Question, ...]
    body: Body
    acquisition: Acquisition


def plan_phantoms(studies: int, seed: int = 0, detail: float = 1.0) -> list[Plan]:
    """Plan every study: 100 or a fifth (the smaller) for test, a twentieth for validation, the rest for training."""
    if studies < 10:
        raise ValueError(f"a phantom data set needs at least 10 studies, not {studies}, to fill its three splits")
    random = np.random.default_rng(seed)
    test = min(100, studies // 5)
    sizes = {"test": test, "validation": max(1, studies // 20)}
    sizes["train"] = studies - sum(sizes.values())
    plans: list[Plan] = []
    for split, size in sizes.items():
        questioner, reports, done, phases = Questioner(random), set(), 0, _cycle(PHASES, random)
        while done < size:
            patient = f"ct_case/{len(plans):06d}"
            body = _body(random)
            for series in range(min(1 + (random.random() < 0.35), size - done)):
                plane, phase = str(random.choice(list(PLANE_SHARES), p=list(PLANE_SHARES.values()))), next(phases)
                report = write_report(body, plane, phase, random)
                while report in reports:
                    report = write_report(body, plane, phase, random)
                reports.add(report)
                name = f"{plane.capitalize()}_{phase.replace(' ', '_').replace('-', '_')}_{series}"
                labels = {kind: int(any(finding.kind == kind for finding in body.findings)) for kind in KINDS}
                name = f"{patient}/{name}"
                study = Study(name, patient, f"M3D_Cap/{name}.nii.gz", report, labels, split, "phantom")
                questions = tuple(questioner.ask(study.id, body, plane, phase))
                plans.append(Plan(study, questions, body, Acquisition(plane, phase, int(random.integers(2**31)), detail)))
                done += 1
    return plans


def _cycle(values: Sequence[str], random: np.random.Generator) -> Iterator[str]:
    """Yield each value equally often, in random order."""
    while True:
        yield from random.permutation(values).tolist()


def _body(random: np.random.Generator) -> Body:
    sizes = np.array([len(kinds_of(region)) for region in REGIONS])
    region = str(random.choice(list(REGIONS), p=sizes / sizes.sum()))  # every kind of finding about equally often
    count = random.choice(len(FINDING_COUNTS), p=FINDING_COUNTS)
    taken: set[str] = set()
    findings = []
    for kind in random.choice(kinds_of(region), size=count, replace=False):
        facts = KINDS[str(kind)]
        place = str(random.choice([place for place in facts["places"] if place not in taken or len(facts["places"]) < 4]))
        taken.add(place)
        size = int(random.integers(facts["size_mm"][0], facts["size_mm"][1] + 1)) if "size_mm" in facts else 0
        findings.append(Finding(str(kind), place, size, int(random.integers(1, facts.get("number", 1) + 1))))
    return Body(region, tuple(findings), int(random.integers(2**31)))


def write_phantoms(root: str | Path, studies: int = 800, seed: int = 0, detail: float = 1.0, workers: int = 2) -> list[Study]:
    """Write volumes, reports, questions, labels and masks under `root`; a volume that is there already is kept, so that a killed run
    continues.

    Raises:
        ValueError: `root` holds phantoms of other settings, or planned by another version.
    """
    root = Path(root)
    plans = plan_phantoms(studies, seed, detail)
    settings = root / SETTINGS_FILE
    wanted = {"studies": studies, "seed": seed, "detail": detail, "plan": _digest(plans)}
    if settings.is_file() and json.loads(settings.read_text(encoding="utf-8-sig")) != wanted:
        raise ValueError(
            f"{root} holds phantoms of other settings or of another version ({settings}), not {wanted}; choose another folder or delete it"
        )
    write_json(settings, wanted)
    with ProcessPoolExecutor(workers) as pool:
        jobs = pool.map(partial(_write_volume, root), plans, chunksize=8)
        masks = list(tqdm(jobs, total=len(plans), unit="study", desc="phantoms"))
    written = [replace(plan.study, masks=found) for plan, found in zip(plans, masks, strict=True)]
    m3d_seg.write(root, written, LABELS)
    m3d.write(root, written, [question for plan in plans for question in plan.questions])
    return written


def read_plans(root: str | Path) -> list[Plan]:
    """Return the plans of the phantoms that `write_phantoms` wrote under `root`, made again from their settings.

    Raises:
        FileNotFoundError: `root` holds no phantoms.
        ValueError: they were planned by another version.
    """
    path = Path(root) / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name a folder that `med3dvlm phantom` wrote")
    settings = json.loads(path.read_text(encoding="utf-8-sig"))
    plans = plan_phantoms(settings["studies"], settings["seed"], settings["detail"])
    if _digest(plans) != settings["plan"]:
        raise ValueError(f"{root} holds phantoms of another version, whose lesions this one would draw elsewhere; write them anew")
    return plans


def _digest(plans: Sequence[Plan]) -> str:
    """Return a digest that changes with anything in the plans."""
    facts = [asdict(plan) for plan in plans]
    for fact in facts:
        del fact["study"]["masks"]  # known once it is drawn
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _write_volume(root: Path, plan: Plan) -> dict[str, Mask]:
    """Write the volume and its masks, unless they are there; returns what is known of the masks."""
    import nibabel as nib

    path = root / plan.study.image
    folder = root / m3d_seg.FOLDER / "0000" / plan.study.id.replace("/", "_")
    drawn = next(folder.glob("mask_*.npz"), None)
    if drawn is None or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas, found = draw_with_masks(plan.body, plan.acquisition)
        named = {KINDS[kind]["name"]: mask for kind, mask in found.items()} | canvas.structures()
        drawn = m3d_seg.write_masks(folder, [named.get(name) for name in LABELS], canvas.array.shape)
    if not path.exists():
        affine = np.eye(4)
        affine[:3, :3] = canvas.directions[:, ::-1]  # a NIfTI counts columns first: (w, h, d)
        affine[:3, 3] = canvas.corner
        image = nib.Nifti1Image(canvas.array.astype(np.int16).transpose(2, 1, 0), affine)
        image.header.set_xyzt_units("mm")
        aside = path.with_name("part-" + path.name)
        nib.save(image, aside)
        aside.replace(path)
    facts = {KINDS[finding.kind]["name"]: about_finding(finding, KINDS[finding.kind], plan.study.report) for finding in plan.body.findings}
    facts |= about_structures(plan.body.region)
    return {name: Mask(drawn.relative_to(root).as_posix(), LABELS.index(name), **about) for name, about in facts.items()}
