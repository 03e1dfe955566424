"""The installed package: without extras, and as a wheel outside of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from med3dvlm.programs import EXTRAS

# `evaluate` brings `datasets`, which does not start without pyarrow.
EXTRA_MODULES = sorted(["datasets", *(module for modules in EXTRAS.values() for module in modules)])
BASE = f"""
import sys

MISSING = {EXTRA_MODULES}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):  # such as find_distributions, for their versions
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] in MISSING else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from med3dvlm import Med3DChat, Med3DCLIP, VolumeProcessor, read_volume
from med3dvlm.cli import main

scan, clip, model = sys.argv[1:4]
volume = read_volume(scan)
embedding = Med3DCLIP.from_pretrained(clip).encode_image(VolumeProcessor.from_pretrained(clip)(volume)["pixel_values"])
assert embedding.ndim == 2
Med3DChat.from_pretrained(model).ask(scan, "Which organ?", max_new_tokens=3)
assert main(["inspect", scan]) == main(["ask", model, scan, "Which organ?", "--max-new-tokens", "3"]) == 0
assert main(sys.argv[4:]) == 2
assert not sys.modules.keys() & set(MISSING)
"""


@pytest.mark.slow
def test_the_base_reads_embeds_and_asks(phantoms: Path, tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    """No extra is installed; programs that need one name it."""
    scan = next(phantoms.rglob("*.nii.gz"))
    command = ["train", "stage1", "--config", "smoke/stage1_siglip", "--data", tmp_path, "--output-dir", tmp_path]
    words = [sys.executable, "-c", BASE, scan, tiny_models.clip, tiny_models.vlm, *command]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "accelerate is not installed, which this needs; install it by: pip install 'med3dvlm[train]'" in done.stderr


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a fresh copy of the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    shutil.copytree(repository / "med3dvlm", source / "med3dvlm", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    subprocess.run(build, cwd=source, check=True)
    return next((source / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_all_files(wheel: Path, repository: Path) -> None:
    files = {path for path in (repository / "med3dvlm").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(repository).as_posix() for path in files} <= set(zipfile.ZipFile(wheel).namelist())


COMMANDS = """
import sys
from pathlib import Path

import med3dvlm
from med3dvlm.cli import main

assert Path(med3dvlm.__file__).is_relative_to(sys.argv[1])
for line, expected in (
    ("phantom scans --studies 16 --detail 0.3 --workers 1", 0),
    ("prepare m3d scans prepared --size 16,32,32 --workers 1", 0),
    ("train stage1 --config smoke/stage1_siglip --data prepared --output-dir stage1 --text-encoder new --train-text --max-steps 2 "
     '--text-options {"hidden_size":16,"num_hidden_layers":1,"num_attention_heads":2,"intermediate_size":24}', 0),
    ("evaluate retrieval --model stage1 --data prepared --split train --output scores", 0),
    ("train stage1 --config nowhere", 2),
    ("chat --help", 0),
):
    try:
        code = main(line.split())
    except SystemExit as ended:  # a parser's
        code = ended.code
    assert code == expected, line
"""


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    """It is installed by pip into a new folder, beside the libraries and without the repository."""
    own = tmp_path / "own"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(own), str(wheel)]
    subprocess.run(install, check=True)
    # -S leaves out the environment's own .pth files, the repository's among them.
    python = [sys.executable, "-S"]
    environment = {"PYTHONPATH": f"{own}{os.pathsep}{sysconfig.get_path('purelib')}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*words: object) -> str:
        settings = environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [*python, *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "evaluate" in run(own / "bin" / "med3dvlm", "--help")  # the entry point
    printed = run("-c", COMMANDS, own)
    assert "--port" in printed and "R@1" in printed and "demo/stage1_siglip" in printed
