"""Exit codes, and one sentence for everything that can be wrong with the input or the output of a command."""

import gzip
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from med3dvlm import cli
from tests.cli.scans import Run, adapter_of, sentence, write


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
def test_unusable_scans(run: Run, model: Path, tmp_path: Path, kind: str) -> None:
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


def test_unusable_models(run: Run, scan: Path, model: Path, tmp_path: Path) -> None:
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
        (["prepare", "m3d", "a", "b", "--spacing", "1,1,1"], "prepared volumes use --target-spacing"),
        (["inspect", "scan.npy", "--spacing", "1,2"], "must be numbers Z,Y,X with commas"),
        (["inspect", "scan.npy", "--hu", "mine"], "invalid choice"),
        (["inspect", "scan.npy", "--orientation", "SPP"], "'SPP' must be one letter each of L/R, A/P and I/S, as in SPL"),
        (["dance"], "invalid choice"),
        (["ask", "model"], "required"),
        ([], "required"),
    ],
)
def test_wrong_command_lines(run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
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
def test_wrong_settings(run: Run, phantoms: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"SRC": phantoms, "DST": tmp_path / "result", "EMPTY": tmp_path}
    code, _, error = run(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in sentence(error)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["inspect", "phantom", "prepare", "merge"])
def test_unwritable_outputs(run: Run, phantoms: Path, scan: Path, tmp_path: Path, command: str) -> None:
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


@pytest.mark.parametrize("command", ["inspect", "phantom", "prepare", "merge"])
def test_a_full_disk_leaves_no_incomplete_file(run: Run, command: str, phantoms: Path, scan: Path, model: Path, tmp_path: Path) -> None:
    """A limit of 2000 bytes for each file causes the same failure while writing, without filling a disk."""
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


def test_tracebacks_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        cli.main(["--traceback", "inspect", str(tmp_path / "missing.nii")])


def test_light_commands_start_without_torch(scan: Path) -> None:
    code = "import sys; from med3dvlm import cli; cli.main(sys.argv[1:]); assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, "inspect", str(scan)], capture_output=True, check=True)
