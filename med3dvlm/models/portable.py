"""The code that a model's folder carries, so that it loads where med3dvlm is not installed.

    AutoModel.from_pretrained(folder, trust_remote_code=True)

One file, CODE_FILE, holds the sources of the models and of all modules that they import, as text. Where med3dvlm is installed, the file takes
the classes from there; elsewhere it imports the copy, under a name of its own. The loaders of med3dvlm never run it.
"""

import ast
import hashlib
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from med3dvlm.files import atomic_file, write_text

CODE_FILE = "modeling_med3dvlm.py"
CLASSES = {
    "Med3DCLIP": "models.clip",
    "Med3DCLIPConfig": "models.clip",
    "Med3DCLIPProcessor": "models.clip",
    "Med3DSegmenter": "models.segmentation",
    "Med3DSegmenterConfig": "models.segmentation",
    "Med3DVLM": "models.vlm",
    "Med3DVLMConfig": "models.vlm",
    "Med3DVLMProcessor": "models.vlm",
}
PACKAGE = Path(__file__).parents[1]
OPENING = """# Written by med3dvlm, of which it holds a copy: what trust_remote_code=True loads.
# Where med3dvlm is installed, its classes are taken, and the copy is not imported.

import importlib.abc
import importlib.util
import sys

NAME = "{name}"
CLASSES = {classes}
SOURCES = {{}}
"""
CLOSING = """

class Copy(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    # Imports the modules in SOURCES.

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, origin=__file__) if name in SOURCES else None

    def is_package(self, name):
        return any(other.startswith(f"{name}.") for other in SOURCES)

    def get_source(self, name):
        return SOURCES[name]

    def exec_module(self, module):
        module.__file__ = __file__
        super().exec_module(module)


package = "med3dvlm"
if importlib.util.find_spec(package) is None:
    package = NAME
    sys.meta_path.append(Copy())
for class_name, module_name in CLASSES.items():
    globals()[class_name] = getattr(importlib.import_module(f"{package}.{module_name}"), class_name)
"""
QUOTES = "'" * 3


class Carried:
    """Base of the classes in CODE_FILE."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing: transformers would write the file of the class alone when a loaded model is saved again."""


class Portable(Carried):
    """Base of models and processors whose `save_pretrained` also writes the code."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, with CODE_FILE."""
        written = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_code(Path(save_directory))
        return written


def auto_map(**classes: str) -> dict[str, str]:
    """Return the map from transformers' Auto classes to classes in CODE_FILE."""
    return {auto_class: f"{Path(CODE_FILE).stem}.{name}" for auto_class, name in classes.items()}


def write_code(folder: Path) -> None:
    """Write CODE_FILE to the folder."""
    if Path(__file__).name == CODE_FILE:  # this is such a copy
        with atomic_file(folder / CODE_FILE) as aside:
            shutil.copyfile(__file__, aside)
    else:
        write_text(folder / CODE_FILE, code())


@cache
def code() -> str:
    """Return the content of CODE_FILE."""
    sources = {module: path.read_text(encoding="utf-8-sig") for module, path in sorted(_needed().items())}
    sources[PACKAGE.name] = ""  # it names what is not here
    if any(QUOTES in source or source.endswith("\\") for source in sources.values()):
        raise ValueError("a module cannot be quoted by three single quotes; write its text with double ones")
    name = "med3dvlm_" + hashlib.sha256(repr(sources).encode()).hexdigest()[:12]
    renamed = {
        module: re.sub(r"^(\s*(?:from|import) )med3dvlm\b", rf"\g<1>{name}", source, flags=re.M) for module, source in sources.items()
    }
    quoted = (f"\nSOURCES[NAME + {module.removeprefix('med3dvlm')!r}] = r{QUOTES}{source}{QUOTES}\n" for module, source in renamed.items())
    return OPENING.format(name=name, classes=CLASSES) + "".join(quoted) + CLOSING


def _needed() -> dict[str, Path]:
    """Return the modules that CLASSES import, wherever in a file, and the packages that these lie in: name -> file."""
    found: dict[str, Path] = {}
    waiting = [f"med3dvlm.{module}" for module in CLASSES.values()]
    while waiting:
        module = waiting.pop()
        path = _file(module)
        if module not in found and path is not None and module != PACKAGE.name:
            found[module] = path
            waiting += [module.rpartition(".")[0], *_imported(path)]
    return found


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8-sig"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("med3dvlm"):
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _file(module: str) -> Path | None:
    """Return the file of a module of ours."""
    package, *within = module.split(".")
    place = PACKAGE.joinpath(*within)
    candidates = (place / "__init__.py", place.with_suffix(".py"))
    return next((path for path in candidates if package == "med3dvlm" and path.is_file()), None)
