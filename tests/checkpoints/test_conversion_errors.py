"""Inputs that `convert_published` refuses: each gets one sentence, and no file is left."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import med3dvlm.checkpoints.convert.conversion
from med3dvlm.checkpoints import convert_published
from med3dvlm.checkpoints.convert.weights import find_weights, write_safetensors
from tests import released
from tests.golden_weights import published_weights


def test_missing_unexpected_and_mis_shaped_tensors_are_listed_by_their_released_names(tmp_path: Path) -> None:
    source = released.nano(
        tmp_path / "released",
        **{
            "encoder.s1.0.scale": None,
            "encoder.s1.0.mlp.mlp.0.bias": None,
            "encoder.s4.0.more": torch.ones(2),
            "encoder.s2.0.scale": torch.ones(65),
            "encoder.s0.0.1.c2.0.weight": torch.ones(32, 32, 3, 1, 1),
        },
    )
    said = released.refused("is not a checkpoint of DCFormer", source, tmp_path / "ours", size=released.SMALL)
    assert "it lacks encoder.s1.0.scale, encoder.s1.0.mlp.mlp.0.bias;" in said
    assert "it has besides encoder.s4.0.more;" in said
    assert "encoder.s0.0.1.c2.0.weight [32, 32, 3, 1, 1], encoder.s2.0.scale [65] instead of [64]" in said


def test_the_tensor_that_determines_the_size_is_required(tmp_path: Path) -> None:
    released.refused(
        "lacks encoder.s0.0.0.c1.0.bias, which tells",
        released.nano(tmp_path / "released", **{"encoder.s0.0.0.c1.0.bias": None}),
        tmp_path / "ours",
    )


def test_tensors_emptied_by_zero3_are_explained(tmp_path: Path) -> None:
    source = released.nano(tmp_path / "released", **{"encoder.s1.0.scale": torch.empty(0), "encoder.s2.0.scale": torch.empty(0)})
    released.refused(r"2 tensors have the shape \[0\] .* saved under ZeRO-3 .* zero_to_fp32.py", source, tmp_path / "ours")


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch run-by-the-pickle",)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_not_run(new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = published_weights("projector_mlp")
    torch.save({"state_dict": weights, "callback": Code()}, tmp_path / "mm_projector.bin", _use_new_zipfile_serialization=new)
    released.refused(r"mm_projector.bin holds code \(.*system\), which might do anything", tmp_path / "mm_projector.bin", tmp_path / "ours")
    (tmp_path / "bare.bin").write_bytes(pickle.dumps(Code()))
    released.refused("bare.bin", tmp_path / "bare.bin", tmp_path / "ours")
    assert not (tmp_path / "run-by-the-pickle").exists()


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.99])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_damaged_file_is_refused(ending: str, keep: float, tmp_path: Path) -> None:
    file = tmp_path / f"weights{ending}"
    weights = published_weights("projector_mlp")
    save_file(weights, file) if ending == ".safetensors" else torch.save(weights, file)
    content = file.read_bytes()
    file.write_bytes(content[: keep if keep >= 1 else int(keep * len(content))])
    released.refused(f"weights{ending} is damaged", file, tmp_path / "ours")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    source = released.vlm(tmp_path / "released", shards=4)
    (source / "model-00002-of-00004.safetensors").unlink()
    (source / "model-00003-of-00004.safetensors").unlink()
    expected = "2 of 4 shards are missing .*: model-00002-of-00004.safetensors, model-00003-of-00004.safetensors; download"
    released.refused(expected, source, tmp_path / "ours")
    (source / "model.safetensors.index.json").unlink()
    released.refused(expected, source, tmp_path / "ours")


def test_the_weights_file_is_found_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.bin", "b.pt", "optimizer.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path) == [tmp_path / "a.bin"]
    (tmp_path / "c.bin").touch()
    with pytest.raises(ValueError, match=r"several checkpoints \(a.bin, c.bin\); name one"):
        find_weights(tmp_path)
    (tmp_path / "d.safetensors").touch()
    assert find_weights(tmp_path) == [tmp_path / "d.safetensors"]
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        find_weights(released.vlm_settings(tmp_path / "empty"))


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(3)])
def test_a_pickle_without_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    released.refused(
        "holds a (list|Tensor), not a state_dict|holds no tensors", released.write_pickle(tmp_path / "a.bin", content), tmp_path / "ours"
    )


def test_an_unknown_path_or_hub_id_is_refused(tmp_path: Path) -> None:
    released.refused("neither a file nor a folder nor the id", tmp_path / "nothing" / "here", tmp_path / "ours")
    released.refused("could not be fetched from the hub", "MagicXin/Med3DVLM-Qwen-2.5-7B", tmp_path / "ours")
    (tmp_path / "notes.txt").touch()
    released.refused("notes.txt is not a file of weights", tmp_path / "notes.txt", tmp_path / "ours")
    released.refused("no known layout", released.write_pickle(tmp_path / "a.bin", {"layer.weight": torch.ones(2)}), tmp_path / "ours")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = released.nano(tmp_path / "released")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="would be overwritten"):
        convert_published(source, tmp_path / "ours", size=released.SMALL)
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_verification_notices_one_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(folder: Path, *arguments: Any) -> str:
        digest = write_safetensors(folder, *arguments)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return digest

    monkeypatch.setattr(med3dvlm.checkpoints.convert.conversion, "write_safetensors", flipped)
    released.refused("differs from encoder", released.nano(tmp_path / "released"), tmp_path / "ours", size=released.SMALL, verify=True)


def test_verification_notices_a_conversion_that_is_not_reversible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(med3dvlm.checkpoints.convert.conversion, "to_published", lambda layout, name: None)
    released.refused("the tables are at fault", released.nano(tmp_path / "released"), tmp_path / "ours", size=released.SMALL, verify=True)
