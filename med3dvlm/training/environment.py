"""What a run was computed with: versions, commit, code."""

import hashlib
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch", "monai", "numpy")


def environment() -> dict[str, Any]:
    """Return versions and commit, for the record of a run or an evaluation."""
    commit = None
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists() and shutil.which("git"):  # an installed package may lie in somebody else's repository
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {"versions": versions(), "commit": commit}


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the main packages; None for those that are not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def code_fingerprint() -> str:
    """Return 16 hexadecimal digits that change with any line of this package's code."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
