"""Model cards, and `med3dvlm push` to a stand-in for the hub, which receives the listed files and nothing else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from med3dvlm import cli
from med3dvlm.checkpoints import load_clip, load_vlm
from med3dvlm.checkpoints.hub import WRITTEN, model_card, write_card
from med3dvlm.files import write_json
from med3dvlm.prompts import RESEARCH_NOTICE

RUN = {
    "command": "python stages/stage1_siglip.py --data /home/somebody/scans",
    "settings": {"learning_rate": 1e-4, "seed": 42, "data": "/home/somebody/scans", "loss": "siglip"},
    "data_fingerprint": "0123abcd",
    "parameters": {"trainable": 1234, "frozen": 5},
    "processes": 2,
    "steps": 77,
}


class Hub:
    """Records the uploads."""

    def __init__(self, public: bool = False, error: Exception | None = None) -> None:
        self.public, self.error = public, error
        self.repo: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        if self.error is not None:
            raise self.error
        assert exist_ok
        self.repo = {"id": repo_id, "private": private and not self.public}

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.repo["private"])

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        assert repo_id == self.repo["id"] and not self.files
        for each in operations:
            with each.as_file() as file:
                self.files[each.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture
def folder(tiny_models: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder with a stage-1 model, the records of its training, and the predictions and scores of an evaluation."""
    place = tmp_path / "stage1"
    for part in load_clip(tiny_models.clip):
        part.save_pretrained(place)
    write_json(place / "run.json", RUN)
    (place / "losses.jsonl").write_text("{}\n")
    (place / "notes.txt").write_text("a patient's name")
    (place / "segmenter").mkdir()
    evaluation = tmp_path / "eval" / "retrieval"
    evaluation.mkdir(parents=True)
    write_json(evaluation / "run.json", {"model": str(place), "identity": {"split": "test", "data": "4567"}})
    (evaluation / "scores.md").write_text("| image to text | r1 |\n|---|---|\n| | 0.123 |\n")
    other = tmp_path / "eval" / "other"
    shutil.copytree(evaluation, other)
    write_json(other / "run.json", {"model": str(tmp_path / "elsewhere")})
    return place


def test_only_the_listed_files_are_uploaded(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(folder), "somebody/clip", "--private"]) == 0
    assert hub.repo == {"id": "somebody/clip", "private": True}
    expected = {"README.md", "config.json", "model.safetensors", "modeling_med3dvlm.py", "processor_config.json"}
    assert expected <= set(hub.files) <= expected | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all(hub.files[name] == (folder / name).read_bytes() for name in hub.files if name != "README.md")
    assert b"somebody/scans" not in b"".join(hub.files.values())
    out, error = capsys.readouterr()
    assert out.startswith("somebody/clip holds README.md, ")
    assert error.strip() == "not uploaded: losses.jsonl, notes.txt, run.json, segmenter"


def test_local_paths_of_a_converted_model_are_not_uploaded(folder: Path, hub: Hub) -> None:
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"published": {"layout": "clip", "source": "/home/somebody/weights", "sha256": "00"}})
    assert cli.main(["push", str(folder), "somebody/clip"]) == 0
    assert json.loads(hub.files["config.json"]) == config | {"published": {"layout": "clip", "sha256": "00"}}


def test_the_card_states_the_recorded_figures(folder: Path, hub: Hub) -> None:
    assert cli.main(["push", str(folder), "somebody/clip"]) == 0
    card = hub.files["README.md"].decode()
    for words in (
        RESEARCH_NOTICE, "library_name: transformers", "license: other", "`dcformer_nano`", "distilbert", "recipe m3d", "`0123abcd`",
        "learning_rate 0.0001, seed 42", "1,234 trainable, 5 frozen", "77 on 2 process", 'from_pretrained("somebody/clip", trust_remote_code=True)',
        "### retrieval: split test of data `4567`", "0.123", "## Limits", "the terms of the models and data",
    ):  # fmt: skip
        assert words in card, words
    assert card.count("0.123") == 1 and "home/somebody" not in card


def test_an_edited_card_is_kept(folder: Path, hub: Hub, tmp_path: Path) -> None:
    write_card(folder, folder)
    written = (folder / "README.md").read_text()
    assert written == model_card(folder) and WRITTEN in written
    (folder / "README.md").write_text("mine")
    write_card(folder, folder)
    assert cli.main(["push", str(folder), "somebody/clip"]) == 0
    assert hub.files["README.md"] == b"mine" == (folder / "README.md").read_bytes()


def test_a_merged_model_has_the_record_of_its_adapter(tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    for part in load_vlm(tiny_models.vlm):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "run.json", RUN)
    write_json(tmp_path / "model" / "merged_from.json", {"adapter": str(tmp_path / "adapter")})
    card = model_card(tmp_path / "model")
    assert "`0123abcd`" in card and "| Language model | qwen2 |" in card and "| Projector | mixer |" in card


def test_what_is_refused(folder: Path, hub: Hub, tiny_models: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, checkpoint, unfinished = tmp_path / "adapter", tmp_path / "checkpoint-7", tmp_path / "unfinished"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {})
    shutil.copytree(folder, checkpoint)
    shutil.copytree(folder, unfinished)
    write_json(unfinished / "trainer_state.json", {})
    for place, name, words in (
        (tmp_path / "gone", "a/b", "is not a directory"),
        (adapter, "a/b", "holds an adapter, not a whole model; merge it first"),
        (checkpoint, "a/b", "is a checkpoint of a training"),
        (unfinished, "a/b", "is a checkpoint of a training"),
        (tiny_models.language_model, "a/b", "a model of type qwen2; only those have a card"),
        (folder, "a b", "Repo id must"),
    ):
        assert cli.main(["push", str(place), name]) == 2, name
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1
    hub.public = True
    assert cli.main(["push", str(folder), "a/b", "--private"]) == 2
    assert "a/b exists and is public" in capsys.readouterr().err and not hub.files
    response = SimpleNamespace(headers={}, request=None, status_code=401, url="https://hub")
    hub.error = HfHubHTTPError("401 Unauthorized", response=response)  # type: ignore[arg-type]
    assert cli.main(["push", str(folder), "a/b"]) == 2
    assert "a/b could not be written: 401 Unauthorized; log in with `hf auth login`" in capsys.readouterr().err
    assert json.loads((folder / "run.json").read_text()) == RUN
