"""Every command and example of the README and the pages runs: on tiny models where it names the demo's, only parsed where it would train for days.

Commands run in this process, which has imported what each of them would take seconds for; that they start as programs is for other tests.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from med3dvlm import cli
from tests.evaluation.conftest import chests  # noqa: F401
from tests.launching import programs

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
NOTEBOOKS = [
    REPOSITORY / "docs" / "notebooks" / f"{name}.md" for name in ("scan", "train", "evaluate", "search")
]  # in the order of reading
TEXT = "\n".join([README, *(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md")))])
COMMANDS = list(dict.fromkeys(line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()))
EXAMPLES = list(dict.fromkeys(re.findall(r"```python\n(.*?)```", TEXT, re.S)))


def test_make_commands_are_targets(repository: Path) -> None:
    for target in {*re.findall(r"^ +make (\S+)$", TEXT, re.M), *re.findall(r"`make ([a-z-]+)`", TEXT)}:
        subprocess.run(["make", "--dry-run", target], cwd=repository, check=True, capture_output=True)
    assert "    make demo\n    make test\n" in README


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_page_and_notebook_is_in_the_contents() -> None:
    pages = {path.relative_to(REPOSITORY / "docs").as_posix() for path in (REPOSITORY / "docs").rglob("*.md")}
    assert pages == set(re.findall(r"^ +- (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert {path.relative_to(REPOSITORY).as_posix() for path in NOTEBOOKS} <= set(re.findall(r"\((docs/\S+?\.md)\)", README))


@pytest.mark.slow
def test_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of reading, in one copy of the repository's folder: later ones use what earlier ones leave.

    Kernels and commands are forks of a process that has imported everything.
    """
    jupytext, nbclient = import_module("jupytext"), import_module("nbclient")
    monkeypatch.setenv("PATH", f"{programs()}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    # JPY_PARENT_PID is the process that a kernel ends with, which a fork does not have for its parent.
    start = ["env", "-u", "JPY_PARENT_PID", str(programs() / "python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": start, "display_name": "Python 3", "language": "python"}))
    for name in ("pyproject.toml", "med3dvlm", "stages", "eval", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    check = "assert globals().get('_exit_code', 0) == 0, 'the command above failed'"  # IPython's, of the last line that begins with !
    for path in NOTEBOOKS:
        notebook = jupytext.read(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                lines = cell.source.replace("--studies 40", "--studies 20 --detail 0.5").splitlines()
                cell.source = "\n".join(each for line in lines for each in ([line, check] if line.startswith("!") else [line]))
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.fixture
def places(
    tiny_models: SimpleNamespace,
    phantoms: Path,
    prepared: Path,
    chests: SimpleNamespace,  # noqa: F811
    tmp_path: Path,
) -> dict[str, str]:
    """What the README's paths are in this test."""
    scan = next(phantoms.rglob("*.nii.gz"))
    return {
        "outputs/demo/model": str(tiny_models.vlm),
        "models/med3dvlm-7b": str(tiny_models.vlm),
        "outputs/paper/model": str(tiny_models.vlm),
        "outputs/paper/stage1": str(tiny_models.clip),
        "outputs/demo/stage1/segmenter": str(tiny_models.segmenter),
        "outputs/demo/stage1": str(tiny_models.clip),
        "outputs/demo/mask.nii.gz": str(tmp_path / "mask.nii.gz"),
        "mask.nii.gz": str(tmp_path / "mask.nii.gz"),
        "outputs/demo/prepared": str(prepared),
        "outputs/demo/index": str(tmp_path / "index"),
        "outputs/paper/ct_clip": str(chests.clip),
        "outputs/paper/index": str(tmp_path / "index"),
        "data/ct_rate_256": str(chests.root / "prepared"),
        "outputs/paper/eval": str(tmp_path / "eval"),
        "outputs/demo/montage.png": str(tmp_path / "montage.png"),
        "data/mine_128": str(prepared),
        '"$scan"': str(scan),
        "scan.nii.gz": str(scan),
    }


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("med3dvlm convert")])
def test_conversion_command_parses(line: str) -> None:
    """Released files are not at hand; tests/test_conversion.py converts files like them."""
    from med3dvlm.cli import _parser

    assert _parser().parse_args(shlex.split(line)[1:]).run.__name__ == "_convert"


@pytest.mark.parametrize(
    "line",
    [
        line
        for line in COMMANDS
        if line.startswith(("med3dvlm", "python -m")) and not line.startswith(("med3dvlm convert", "med3dvlm train", "med3dvlm chat"))
    ],
)
def test_command_runs(
    line: str,
    places: dict[str, str],
    chests: SimpleNamespace,  # noqa: F811
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    if line.startswith("med3dvlm prepare"):  # a scan like those of the example, at a size that takes a second
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "table.csv").write_text("image,report\nscan.nii.gz,Normal chest.\n")
        shutil.copy(places["scan.nii.gz"], tmp_path / "mine" / "scan.nii.gz")
        line = re.sub(r"data/mine data/mine_\d+", f"{tmp_path}/mine {tmp_path}/prepared", line)
        line = re.sub(r"128,256,256|24,48,48", "16,32,32", line)
        line = line.replace("data/ct_rate data/ct_rate_256", f"{chests.root}/CT-RATE {tmp_path}/prepared").replace(
            "256,512,512", "16,32,32"
        )
    if line.startswith("med3dvlm search"):
        assert cli.main(["index", str(chests.clip), str(chests.root / "prepared"), places["outputs/paper/index"]]) == 0
    if line.startswith("med3dvlm audit"):
        line += f" --out {tmp_path}"
    if line.startswith("python -m benchmarks.encoder"):
        line += f" --encoder dcformer_nano --size 32,64,64 --runs 1 --output {tmp_path}"
    if line.startswith("med3dvlm encoders"):
        line = line.replace("128,256,256", "32,64,64")
    for name, place in places.items():
        line = line.replace(name, place)
    program, *arguments = shlex.split(line)
    if program == "med3dvlm":
        assert cli.main(arguments) == 0
    else:  # benchmarks measure processes of their own
        subprocess.run([programs() / program, *arguments], check=True)
    assert capfd.readouterr().out


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("med3dvlm train")])
def test_training_command_parses(line: str, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from med3dvlm.training.arguments import StageArguments
    from med3dvlm.training.parsing import parse_arguments

    _, _, name, *arguments = shlex.split(line)
    stage = import_module(f"med3dvlm.{cli.PROGRAMS['train'][name][0]}")
    kinds = [value for value in vars(stage).values() if isinstance(value, type) and issubclass(value, StageArguments)]
    kind = max(kinds, key=lambda value: len(value.__mro__))
    monkeypatch.chdir(repository)
    parsed = parse_arguments(kind, [*arguments, "--output-dir", str(tmp_path), "--use-cpu", "true", "--bf16", "false", "--deepspeed", ""])
    assert parsed.data in ("data/mine_128", "data/mine_24", "data/ct_rate_256")


def test_every_command_is_covered() -> None:
    known = ("med3dvlm", "python -m benchmarks.", "scan=")  # the chat is started by tests/app
    assert [line for line in COMMANDS if not line.startswith(known)] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example: str, places: dict[str, str], tmp_path: Path) -> None:
    for name, place in places.items():
        example = example.replace(name, place)
    done = subprocess.run([programs() / "python", "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for printed in re.findall(r"^print\(.*\)  # (\w.*\]$)", example, re.M):  # an output that the example states
        assert printed in done.stdout
