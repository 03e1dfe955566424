"""The command line: what it prints where, exit codes, and one sentence for everything that can be wrong with the input or the output."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from med3dvlm import Med3DChat, Volume, cli
from med3dvlm.datasets.store import PreparedData
from med3dvlm.inference.out_of_distribution import fit_detector, pool_features
from med3dvlm.prompts import RESEARCH_NOTICE
from tests.inference.learned_chat import REPORTS, train_tiny_model, volume

Run = Callable[..., tuple[int, str, str]]


def write(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> Path:
    """An array with NIfTI's axes (W, H, D), stored LPS."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def noisy(seed: int) -> np.ndarray:
    """One of the two scans that the tiny model knows, taken once more."""
    noise = np.random.default_rng(100 + seed).normal(0, 20, (10, 20, 30))
    return (volume(seed % 2).array + noise).astype(np.float32)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, and which scans it knows."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    trained, processor = train_tiny_model()
    trained.save_pretrained(folder)
    processor.save_pretrained(folder)
    chat = Med3DChat(trained, processor)
    features = torch.cat([pool_features(chat.encode(Volume(noisy(seed), (3.0, 1.0, 1.0), "SPL"))) for seed in range(60)])
    fit_detector(features[:40], features[40:]).save(folder)
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scans") / "scan.nii.gz", noisy(60).transpose())


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "phantoms"
    assert cli.main(["phantom", str(root), "--studies", "12", "--detail", "0.3", "--workers", "1"]) == 0
    return root


def sentence(error: str) -> str:
    """The one line that a command leaves on stderr when it fails."""
    lines = [line for line in error.splitlines() if line.startswith("med3dvlm:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error and "Error:" not in error and "errno" not in error.lower()
    assert error.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("med3dvlm: ")


def bad_scans(folder: Path) -> dict[str, tuple[Path, str]]:
    random = np.random.default_rng(0)
    good = random.integers(-1000, 1000, (30, 20, 10)).astype(np.int16)
    whole = write(folder / "whole.nii.gz", good)
    for name, content in {
        "empty.nii.gz": b"",
        "text.nii.gz": b"This is a letter, not a scan.\n" * 20,
        "truncated.nii.gz": whole.read_bytes()[:-2000],
        "zipped_text.nii.gz": gzip.compress(b"This is a letter, not a scan.\n" * 20),
        "scan.docx": b"PK",
    }.items():
        (folder / name).write_bytes(content)
    hole = good.astype(np.float32)
    hole[3, 4, 5] = np.nan
    return {
        "missing": (folder / "missing.nii.gz", "no such file"),
        "empty": (folder / "empty.nii.gz", "empty"),
        "text": (folder / "text.nii.gz", "cannot be read as NIfTI"),
        "zipped text": (folder / "zipped_text.nii.gz", "cannot be read as NIfTI"),
        "truncated": (folder / "truncated.nii.gz", "cannot be read as NIfTI"),
        "format": (folder / "scan.docx", "not a known scan format"),
        "2D": (write(folder / "flat.nii.gz", good[:, :, :1]), "2D image"),
        "4D": (write(folder / "series.nii.gz", np.stack([good] * 3, axis=-1)), "4D"),
        "NaN": (write(folder / "hole.nii.gz", hole), "NaN"),
        "constant": (write(folder / "constant.nii.gz", np.full((30, 20, 10), 7, np.int16)), "every voxel is 7"),
        "folder": (folder, "DICOM"),
    }


BAD_SCANS = ("missing", "empty", "text", "zipped text", "truncated", "format", "2D", "4D", "NaN", "constant", "folder")


@pytest.mark.parametrize("kind", BAD_SCANS)
def test_a_scan_that_cannot_be_used(run: Run, model: Path, tmp_path: Path, kind: str) -> None:
    path, reason = bad_scans(tmp_path)[kind]
    picture = tmp_path / "out" / "picture.png"
    for command in (["inspect", path, "--out", picture], ["ask", model, path, "Plane?"], ["report", model, path]):
        code, output, error = run(*command)
        assert (code, output) == (2, "")
        assert reason in sentence(error) and str(path) in sentence(error)
    assert not picture.parent.exists()


def test_a_scan_too_small_for_the_model(run: Run, model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "small.nii.gz", np.random.default_rng(0).integers(0, 9, (3, 20, 30)).astype(np.int16))
    code, output, error = run("report", model, path)
    assert (code, output) == (2, "")
    assert "only 30x20x3 voxels but at least 4 are needed" in sentence(error)


def test_a_model_that_cannot_be_used(run: Run, scan: Path, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    for folder, reason in (
        (tmp_path / "none", "is not a directory"),
        (tmp_path / "unfinished", "holds no model"),
        (broken, "damaged or incomplete"),
    ):
        for command in (["ask", folder, scan, "Plane?"], ["report", folder, scan]):
            code, output, error = run(*command)
            assert (code, output) == (2, "")
            assert reason in sentence(error) and str(folder) in sentence(error)


def test_an_empty_question(run: Run, model: Path, scan: Path) -> None:
    code, output, error = run("ask", model, scan, " ")
    assert (code, output) == (2, "")
    assert "question is empty" in sentence(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "m3d", "a", "b", "--size", "1,2"], "three whole numbers"),
        (["prepare", "m3d", "a", "b", "--shard", "3"], "'3' must be I/N, as in 1/8 to 8/8"),
        (["prepare", "m3d", "a", "b", "--size", "64x64x64"], "three whole numbers"),
        (["prepare", "m3d", "a", "b", "--spacing", "1,1,1"], "that of the result is --target-spacing"),
        (["inspect", "scan.npy", "--spacing", "1,2"], "must be numbers Z,Y,X with commas"),
        (["inspect", "scan.npy", "--hu", "mine"], "invalid choice"),
        (["dance"], "invalid choice"),
        (["ask", "model"], "required"),
        ([], "required"),
    ],
)
def test_a_command_line_that_does_not_fit(run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "soup", "SRC", "DST"], "data set 'soup' is unknown; known: m3d, ct_rate"),
        (["prepare", "m3d", "SRC", "DST", "--recipe", "soup"], "Unknown recipe 'soup'; known are m3d"),
        (["prepare", "m3d", "SRC", "DST", "--size", "0,64,64"], "three whole numbers"),
        (["prepare", "m3d", "SRC", "DST", "--workers", "0"], "at least one process"),
        (["prepare", "m3d", "EMPTY", "DST"], "M3D_Cap.json is missing"),
        (["phantom", "DST", "--studies", "3"], "at least 10 studies"),
        (["phantom", "DST", "--workers", "-1"], "at least one process"),
        (["merge", "EMPTY", "DST"], "adapter_config.json"),
        (["encoders", "dcformer_nano", "resnet"], "'resnet' is unknown; known: dcformer_nano, "),
    ],
)
def test_settings_that_do_not_fit(run: Run, phantoms: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"SRC": phantoms, "DST": tmp_path / "result", "EMPTY": tmp_path}
    code, _, error = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in sentence(error)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_inspect_prints_the_geometry_and_draws_a_picture_where_asked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).integers(-900, 1200, (30, 20, 10)).astype(np.int16)
    array[0, 0, 0] = -3024
    path = write(tmp_path / "head.of.patient.nii.gz", array, (0.7, 0.8, 2.5))
    code, output, error = run("inspect", path)
    assert (code, error) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert facts["Scan"] == path.name and str(tmp_path) not in output
    assert facts["Size"].startswith("10 x 20 x 30 voxels")
    assert facts["Spacing"] == "2.5 x 0.8 x 0.7 mm, covering 25 x 16 x 21 mm"
    assert facts["Orientation"].startswith("SPL ") and "axial slices" in facts["Orientation"]
    assert facts["Unit"].startswith("HU") and facts["Values"].startswith("-3024 to 1199")
    assert "padding" in facts["Warning"]
    assert "Picture" not in facts and list(tmp_path.iterdir()) == [path]
    code, output, _ = run("inspect", path, "--out", "picture.png")
    assert output.splitlines()[-1].split() == ["Picture", "picture.png"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    other = tmp_path / "another.name.nii.gz"
    path.rename(other)
    run("inspect", other, "--out", "other.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "picture.png").read_bytes()  # no name is drawn

    np.save(tmp_path / "bare.npy", array)
    code, output, _ = run("inspect", tmp_path / "bare.npy", "--out", tmp_path / "new" / "folder" / "bare.png")
    assert code == 0 and (tmp_path / "new" / "folder" / "bare.png").is_file()
    assert output.count("Warning") == 3 and re.search(r"Spacing +unknown\nOrientation +unknown", output)


def test_inspect_is_told_what_the_file_does_not_say(run: Run, tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(24, 1100, (10, 20, 30)).astype(np.int16)
    np.save(tmp_path / "bare.npy", stored)
    code, output, _ = run("inspect", tmp_path / "bare.npy", "--spacing", "2.5,0.8,0.7", "--hu", "csv", "--rescale", "1,-1024")
    facts = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert code == 0 and facts["Spacing"].startswith("2.5 x 0.8 x 0.7 mm") and facts["Values"].startswith("-1000 to 75")
    assert facts["Unit"].startswith("HU") and facts["Note"] == "the stated slope 1 and intercept -1024 are applied, as hu='csv' says."
    code, output, error = run("inspect", tmp_path / "bare.npy", "--hu", "csv")
    assert (code, output) == (2, "") and "hu='csv' needs the slope and intercept" in sentence(error)
    code, output, error = run("inspect", tmp_path / "bare.npy", "--out", tmp_path / "picture.txt")
    assert (code, output) == (2, "") and "picture.txt: the picture is written as PNG" in sentence(error)
    code, output, error = run("inspect", tmp_path / "bare.npy", "--series", 2)
    assert (code, output) == (2, "") and "not DICOM" in sentence(error)


def test_inspect_straightens_where_asked(run: Run, tmp_path: Path) -> None:
    affine = np.array([[-0.7, 0, 0, 0], [0, -0.8, 0.9, 0], [0, 0, 2.4, 0], [0, 0, 0, 1]])
    array = np.random.default_rng(0).integers(-900, 1200, (30, 20, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "tilted.nii")
    tilted = run("inspect", tmp_path / "tilted.nii")[1]
    assert "sheared by 20.6 degrees" in tilted and "turned by 20.6 degrees" in tilted and "10 x 20 x 30 voxels" in tilted
    straight = run("inspect", tmp_path / "tilted.nii", "--straighten")[1]
    assert "10 x 31 x 30 voxels" in straight and "Note         the slices are resampled to a regular grid" in straight
    assert "2.4 x 0.8 x 0.7 mm" in straight and "turned" not in straight and "--straighten" not in straight


def test_ask_and_report_from_a_shell(model: Path, scan: Path, tmp_path: Path) -> None:
    """stdout has the model's words and nothing else."""
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "med3dvlm.cli", "report", str(model), str(scan)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, REPORTS[0] + "\n"), done.stderr
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"\d+\.\d s, \d+ tokens, confidence (0\.\d\d|1\.00)", lines[-2]), done.stderr
    assert lines[-1] == RESEARCH_NOTICE
    assert "Loading" not in done.stderr and "outside" not in done.stderr


def test_a_scan_out_of_distribution_is_named_so(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    code, output, error = run("ask", model, scan, "Which organ has a lesion?")
    assert (code, output) == (0, "Liver\n")
    assert "outside the data" not in error and RESEARCH_NOTICE in error
    stripes = np.tile(np.float32([0, 1000, 300, 0, 50]), (24, 20, 6)).transpose()
    code, output, error = run("ask", model, write(tmp_path / "stripes.nii", stripes), "Which organ has a lesion?")
    assert code == 0 and output
    assert re.search(
        r"lies outside the data that the model was trained on \(distance .*, limit .*\): its answer is not to be relied on\.", error
    )


def test_a_model_without_a_detector_says_so(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        if "out_of_distribution" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    code, output, error = run("ask", tmp_path, scan, "Plane?", "--max-new-tokens", "5")
    assert (code, output) == (0, "Axial\n")
    assert f"{tmp_path} holds no out_of_distribution.safetensors" in error


def test_phantoms_and_their_baselines(run: Run, phantoms: Path) -> None:
    code, output, error = run("phantom", phantoms, "--studies", 12, "--detail", 0.3, "--workers", 1)  # again: nothing is drawn anew
    assert code == 0 and "Traceback" not in error
    assert re.search(r"12 studies of \d+ patients in .*phantoms: 9 train, 1 validation, 2 test\n", output)
    assert set(re.findall(r"^  (\S+) +[01]\.\d{3}$", output, re.MULTILINE)) >= {"plane", "phase", "organ"}
    assert len(list(phantoms.rglob("*.nii.gz"))) == 12


def test_prepare_goes_on_after_bad_samples_and_names_them(run: Run, phantoms: Path, tmp_path: Path) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    bad = sorted(source.rglob("*.nii.gz"))[:2]
    bad[0].write_bytes(bad[0].read_bytes()[:500])
    bad[1].unlink()
    arguments = ("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    code, output, error = run(*arguments)
    summary = json.loads((prepared / "summary.json").read_text())
    assert code == 1
    assert (summary["studies"], summary["failures"]) == (10, 2)
    assert "Warning: 2 of 12 studies could not be prepared" in error and "Traceback" not in error
    for path in bad:
        assert str(path.relative_to(source / "M3D_Cap")).removesuffix(".nii.gz") in error
    with pytest.raises(ValueError, match="could not be prepared"):
        PreparedData(prepared)
    assert f"Prepared     10 studies, {summary['questions']} questions, fingerprint {summary['fingerprint']}" in output
    assert run(*arguments)[1] == output

    for path in source.rglob("*.nii.gz"):
        path.unlink()
    code, _, error = run("prepare", "m3d", source, tmp_path / "nothing", "--size", "16,32,24", "--workers", 1)
    assert code == 2 and "none of the 12 studies" in sentence(error)


def test_a_split_within_another_is_prepared_once(run: Run, phantoms: Path, tmp_path: Path) -> None:
    """As M3D's test1k; one of its scans is lost."""
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    path = source / "M3D_Cap" / "M3D_Cap.json"
    listing = json.loads(path.read_text())
    path.write_text(json.dumps({"part": listing["train"][:3], **listing}))
    (source / listing["train"][0]["image"]).unlink()
    code, _, error = run("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    summary, split_file = json.loads((prepared / "summary.json").read_text()), prepared / "split_part.json"
    assert (code, summary["studies"], summary["failures"]) == (1, 11, 1) and "part" not in summary["splits"]
    assert f"pass --split-file {split_file}" in error
    whole, part = PreparedData(prepared, True), PreparedData(prepared, True, split_file)
    assert [study.id for study in part.studies("part")] == [study.id for study in whole.studies("train")[:2]]
    assert {q.study for q in part.questions("part")} == {study.id for study in part.studies("part")}


def test_shards_are_finished_by_a_run_without(run: Run, phantoms: Path, tmp_path: Path) -> None:
    arguments = ("prepare", "m3d", phantoms, tmp_path / "prepared", "--size", "16,32,24", "--workers", 1)
    for part in (1, 2):
        code, output, error = run(*arguments, "--shard", f"{part}/2")
        assert code == 0 and json.loads(output) == {"shard": f"{part}/2", "studies": 6, "made": 6}
        assert f"When all 2 shards are done, run the command without --shard to finish {tmp_path / 'prepared'}." in error
    assert "Prepared     12 studies" in run(*arguments)[1]
    assert len(PreparedData(tmp_path / "prepared").studies("train")) == 9
    assert "no shard 3/2" in sentence(run(*arguments, "--shard", "3/2")[2])


def test_prepare_goes_on_after_missing_reports(run: Run, phantoms: Path, tmp_path: Path) -> None:
    source, prepared = tmp_path / "source", tmp_path / "prepared"
    subprocess.run(["cp", "-r", phantoms, source], check=True)
    lost, empty = sorted((source / "M3D_Cap" / "ct_case").rglob("*.txt"))[:2]
    lost.unlink()
    empty.write_text(" ")
    code, _, error = run("prepare", "m3d", source, prepared, "--size", "16,32,24", "--workers", 1)
    summary = json.loads((prepared / "summary.json").read_text())
    assert (code, summary["studies"], summary["failures"]) == (1, 10, 2)
    assert "Warning: 2 of 12 studies could not be prepared" in error
    assert f"{lost}, the report of" in error and "is missing" in error and f"{empty}, the report of" in error and "is empty" in error
    assert len(PreparedData(prepared, exclude_failures=True).questions("train")) > 0


@pytest.mark.parametrize("command", ["inspect", "phantom", "prepare", "merge"])
def test_an_output_place_that_cannot_be_written(run: Run, phantoms: Path, scan: Path, tmp_path: Path, command: str) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "adapter_config.json").write_text("{}")
    for place, reasons in ((file / "below", "a file, not a folder|is a file"), (Path("/proc/below"), "no such file|not permitted|No such")):
        arguments = {
            "inspect": ["inspect", scan, "--out", place / "picture.png"],
            "phantom": ["phantom", place, "--studies", 10],
            "prepare": ["prepare", "m3d", phantoms, place],
            "merge": ["merge", tmp_path, place / "model"],
        }[command]
        code, _, error = run(*arguments)
        assert code == 2
        assert re.search(reasons, sentence(error)) and str(place) in sentence(error)
    assert file.read_text() == "mine"


def test_a_merge_overwrites_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    code, _, error = run("merge", tmp_path, model)
    assert code == 2 and "exists and would be overwritten" in sentence(error)
    assert before == {file.name: file.stat().st_mtime_ns for file in model.iterdir()}


def adapter_of(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    trained = Med3DChat.from_pretrained(model, device="cpu").model
    trained.name_or_path = str(model)
    adapted = get_peft_model(trained, LoraConfig(r=2, target_modules=r"language_model\..*_proj", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return folder


def test_merge_writes_a_model_that_answers(run: Run, model: Path, scan: Path, tmp_path: Path) -> None:
    adapter = adapter_of(model, tmp_path / "adapter")
    code, output, error = run("merge", adapter, tmp_path / "new" / "merged")
    assert (code, output) == (0, f"{tmp_path / 'new' / 'merged'} holds the merged model\n"), error
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    assert (tmp_path / "new" / "merged").stat().st_mode & 0o777 == tmp_path.joinpath("new").stat().st_mode & 0o777
    assert run("ask", tmp_path / "new" / "merged", scan, "Plane?")[0] == 0


@pytest.mark.parametrize("command", ["inspect", "phantom", "prepare", "merge"])
def test_a_full_disk_leaves_nothing_half_written(run: Run, command: str, phantoms: Path, scan: Path, model: Path, tmp_path: Path) -> None:
    """No file may grow beyond 2000 bytes: the same failure in the middle of writing, without filling a disk."""
    adapter = adapter_of(model, tmp_path / "adapter") if command == "merge" else None
    out = tmp_path / "out"
    arguments, final = {
        "inspect": (["inspect", scan, "--out", out / "picture.png"], "*.png"),
        "phantom": (["phantom", out, "--studies", 10, "--detail", 0.3, "--workers", 1], "*.nii.gz"),
        "prepare": (["prepare", "m3d", phantoms, out, "--size", "16,32,24", "--workers", 1], "*.safetensors"),
        "merge": (["merge", adapter, out / "model"], "*"),
    }[command]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        code, _, error = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2, error
    assert re.search("larger than is allowed|requested and .* written", sentence(error))
    assert [path for path in out.rglob(final) if not path.name.startswith(("part-", "."))] == []


def test_ctrl_c(run: Run, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("med3dvlm.volume.read_volume", interrupted)
    assert run("inspect", scan) == (130, "", "med3dvlm: interrupted; started again, the same command continues\n")


def test_the_place_of_an_error_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["--traceback", "inspect", str(tmp_path / "missing.nii")])


def test_light_commands_start_without_torch(scan: Path) -> None:
    code = "import sys; from med3dvlm import cli; cli.main(sys.argv[1:]); assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, "inspect", str(scan)], capture_output=True, check=True)


def test_a_public_name_registers_its_kind(model: Path) -> None:
    """Each in a process of its own, where nothing else has imported the models."""
    code = """
import os, sys
import torch
from transformers import AutoModel, AutoProcessor
for name in sys.argv[2:]:
    if os.fork():
        os.wait()
        continue
    __import__("med3dvlm", fromlist=[name])
    getattr(sys.modules["med3dvlm"], name)
    print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__, flush=True)
    os._exit(0)
"""
    command = [sys.executable, "-c", code, str(model), "Med3DVLM", "Med3DVLMProcessor", "Med3DChat"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Med3DVLM Med3DVLMProcessor"] * 3, done.stderr


def test_chat_is_the_repositorys_page(run: Run, tmp_path: Path) -> None:
    """What it says of a folder without a model is the page's own sentence, with its exit code."""
    code, _, error = run("chat", tmp_path / "none", "--port", 7999)
    assert code == 2 and "none" in error and len(error.strip().splitlines()) == 1, error
