"""Stage 3's adapter and the model merged from it: they answer alike, and nothing else is replaced."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from med3dvlm import Med3DChat, Med3DVLMProcessor
from med3dvlm.checkpoints import load_vlm, merge_lora, verify_equal
from med3dvlm.datasets import m3d
from med3dvlm.datasets.store import PreparedData
from med3dvlm.files import DETECTOR_FILE
from med3dvlm.training import stage3_lora
from tests.stages.running import Run

TWO_STEPS = ("--max-steps", 2, "--learning-rate", 0.01, "--cache-features", "false")


def test_adapter_and_merged_model_give_equal_answers(
    run: Callable[..., Run], tiny_models: SimpleNamespace, tmp_path: Path, prepared: Path, phantoms: Path
) -> None:
    result = run(stage3_lora, "--learning-rate", 0.01, "--merged", tmp_path / "merged")
    base, processor = load_vlm(tiny_models.vlm)
    merged, _ = load_vlm(tmp_path / "merged")
    data = PreparedData(prepared)
    volumes = [data.volume(study) for study in data.studies("test")]
    question = [{"role": "user", "content": "Which plane is this scan?"}]
    batch = dict(processor([question] * len(volumes), volumes))
    with pytest.raises(ValueError, match="the models differ"):
        verify_equal(base, merged, batch)
    adapted = PeftModel.from_pretrained(base, result.output).eval()
    assert verify_equal(adapted, merged, batch) < 1e-4
    studies, _ = m3d.read(phantoms, "test")
    assert Med3DChat.from_pretrained(tmp_path / "merged").ask(phantoms / studies[0].image, "Which plane?", max_new_tokens=3).tokens > 0


def test_a_merge_replaces_a_model_completely_or_not_at_all(
    run: Callable[..., Run], tiny_models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, merged = run(stage3_lora, *TWO_STEPS).output, tmp_path / "merged"
    shutil.copytree(tiny_models.vlm, merged)
    (merged / DETECTOR_FILE).write_text("of other weights")
    before = {path.name: path.read_bytes() for path in merged.iterdir()}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Med3DVLMProcessor, "save_pretrained", interrupted)
        merge_lora(adapter, merged)
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    model = merge_lora(adapter, merged)
    assert (merged / DETECTOR_FILE).read_bytes() == (adapter / DETECTOR_FILE).read_bytes() and not list(tmp_path.glob(".merged*"))
    for name, value in load_vlm(merged)[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert (merged / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_an_adapter_finds_its_base_model_or_needs_its_path(
    run: Callable[..., Run], tiny_models: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_models.vlm, base)
    adapter = run(stage3_lora, "--max-steps", 1, "--model", os.path.relpath(base)).output
    monkeypatch.chdir(tmp_path)
    one = merge_lora(adapter, tmp_path / "one").state_dict()
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="base, which is not there; name its present folder: med3dvlm merge --base"):
        merge_lora(adapter, tmp_path / "two")
    two = merge_lora(adapter, tmp_path / "two", tmp_path / "moved").state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_merged_model_of_another_run_is_kept(run: Callable[..., Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the run that made it replaces it when it is started again."""
    merged = tmp_path / "merged"
    first = run(stage3_lora, "--max-steps", 1, "--merged", merged)
    before = {path.name: path.read_bytes() for path in merged.iterdir()}
    with pytest.raises(SystemExit):
        run(stage3_lora, "--max-steps", 1, "--learning-rate", 0.1, "--merged", merged)
    assert f"holds the model merged from {first.output}, which the one of" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == before
    with pytest.raises(SystemExit):
        run(stage3_lora, "--max-steps", 1, "--merged", first.output, output=first.output)
    assert "would replace the adapter" in capsys.readouterr().err
    assert run(stage3_lora, "--max-steps", 1, "--merged", merged, output=first.output).record == first.record


def test_output_has_the_permissions_of_new_files(run: Callable[..., Run], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        output = run(stage3_lora, "--max-steps", 2, "--merged", tmp_path / "merged").output
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for folder in (output, tmp_path / "merged") for path in folder.rglob("*")}
    assert len(modes) > 15 and {path: mode for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)} == {}
