"""Atomic files and folders, and JSON lines."""

import json
import re
from pathlib import Path

import pytest

from med3dvlm.files import differences, install_model, read_lines, write_json, write_lines

LINE_ENDS = ["one\u2028two\u2029three\u0085four", "\x0b\x0c\x1c\r\n"]  # as str.splitlines sees it


def test_lines_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    records = [{"text": text, "number": 1e-7} for text in LINE_ENDS]
    write_lines(path, iter(records))
    assert read_lines(path) == records and len(path.read_bytes().split(b"\n")) == 3
    assert read_lines(tmp_path / "none.jsonl") == []
    write_lines(path, [])
    assert read_lines(path) == []


def test_an_incomplete_line_is_ignored_and_cut_off_by_repair(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = '{"a": "\u2028é"}\n'.encode()
    path.write_bytes(whole + whole[:-4])  # inside a character
    assert read_lines(path) == [{"a": "\u2028é"}] and path.stat().st_size > len(whole)
    assert read_lines(path, repair=True) == [{"a": "\u2028é"}] and path.read_bytes() == whole
    path.write_bytes(b"{}\nno\n")
    with pytest.raises(ValueError, match="lines.jsonl line 2 is not valid JSON"):
        read_lines(path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"rate": 1e-8, "name": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"rate": 1e-8, "name": "é"}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"rate": object()})
    with pytest.raises(TypeError):
        write_lines(path, [{"fine": 1}, {"not": object()}])
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_byte_order_marks_are_ignored(repository: Path, tmp_path: Path) -> None:
    """Editors of Windows write one at the beginning, so texts are read as utf-8-sig and JSON lines from bytes."""
    sources = [path for folder in ("med3dvlm", "stages", "eval", "app") for path in (repository / folder).rglob("*.py")]
    assert len(sources) > 100
    reading = re.compile(r"\.read_text\((?!encoding=\"utf-8-sig\")|\.open\((?:newline=\"\", )?(?:encoding=\"utf-8\")?\)|\bjson\.load\(")
    assert not [path for path in sources if reading.search(path.read_text(encoding="utf-8"))]
    (tmp_path / "lines.jsonl").write_bytes(b"\xef\xbb\xbf{}\n{}\n")
    assert read_lines(tmp_path / "lines.jsonl") == [{}, {}]


def model(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(folder.name)
    return folder


def test_a_model_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at any point, the folder has no configuration, so it holds no model."""
    old = (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "out_of_distribution.safetensors",
        "notes.txt",
    )
    new = ("config.json", "model.safetensors", "tokenizer.json")
    replace = Path.replace
    for stop in range(len(new)):
        folder, aside = model(tmp_path / f"old{stop}", *old), model(tmp_path / f"new{stop}", *new)
        left = iter([True] * stop)

        def stopping(self: Path, target: Path, left: object = left) -> Path:
            if not next(left, False):  # type: ignore[call-overload]
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            install_model(aside, folder)
        monkeypatch.setattr(Path, "replace", replace)
        assert not (folder / "config.json").exists()
        install_model(model(aside, *new), folder)  # saved again by who continues
        assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(new, f"new{stop}") | {"notes.txt": f"old{stop}"}
        assert not aside.exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_model_is_moved_to_an_empty_folder_at_once(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "folder").mkdir()
    install_model(model(tmp_path / "aside", "config.json"), tmp_path / "folder")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["folder", "folder/config.json"]


def test_settings_that_differ_are_listed_with_both_values() -> None:
    before = {"split": "test", "limit": 2, "versions": {"torch": "2.9", "numpy": "2.1"}, "gone": 1}
    now = {"split": "test", "limit": None, "versions": {"torch": "2.10", "numpy": "2.1"}, "new": [1]}
    assert differences(before, now) == ["limit (2, not null)", 'versions: torch ("2.9", not "2.10")', "new (null, not [1])"]
    assert differences(before, before) == []
