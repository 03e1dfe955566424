"""A model's folder loads by the Auto classes in a process without med3dvlm, and gives the same results."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from med3dvlm import Med3DCLIP
from med3dvlm.checkpoints import load_clip, load_segmenter, load_vlm
from med3dvlm.models.pointing import POINTING_TOKEN, pointing_settings
from med3dvlm.models.portable import CODE_FILE, code
from med3dvlm.models.segmentation import Med3DSegmenter

ELSEWHERE = """
import os, sys
sys.modules["med3dvlm"] = None  # as if it were not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

root, scan, *kinds = sys.argv[1:]
failed = False
for kind in kinds:
    if os.fork():  # each kind begins in a process that knows no other
        failed |= os.wait()[1] != 0
        continue
    folder, out = f"{root}/{kind}/model", f"{root}/{kind}/out"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        if kind == "clip":
            output = model(**processor(volumes=scan, text=["Liver mass."]), return_loss=False)
            save_file({"first": output.image_embeds, "second": output.text_embeds}, out)
        elif kind == "segmenter":
            inputs = processor(volumes=scan, text=["liver mass"])
            output = model(inputs["pixel_values"], inputs["input_ids"][None], inputs["attention_mask"][None])
            save_file({"first": output.logits, "second": output.presence}, out)
        else:
            batch = processor([[{"role": "user", "content": "Where?"}]], [scan])
            save_file({"first": model(**batch).logits, "second": model.generate(**batch, max_new_tokens=4).float()}, out)
    model.save_pretrained(out + "-again")
    processor.save_pretrained(out + "-again")
    assert not any(name.split(".")[0] in ("med3dvlm", "gradio") for name, module in sys.modules.items() if module)
    break
sys.exit(failed)
"""
KINDS = ("clip", "segmenter", "vlm", "pointing")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    voxels = np.random.default_rng(0).integers(-900, 900, (20, 24, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def models(tiny_models: SimpleNamespace) -> dict[str, tuple[Any, Any]]:
    """Model and processor by kind."""
    parts = {kind: load_vlm(tiny_models.vlm) if kind in ("vlm", "pointing") else load_clip(tiny_models.clip) for kind in KINDS}
    model, processor = parts["pointing"]
    model.add_pointing(pointing_settings(load_segmenter(tiny_models.segmenter)[0].config, processor.add_pointing(POINTING_TOKEN)))
    torch.manual_seed(0)
    clip, processor = parts["segmenter"]
    return parts | {"segmenter": (Med3DSegmenter.from_clip(clip, embedding_dim=8, attention_heads=1).eval(), processor)}


@pytest.fixture(scope="module")
def elsewhere(models: dict[str, tuple[Any, Any]], scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, with `model`, `out` and `out-again`: saved here, and what the other process made of it."""
    root = tmp_path_factory.mktemp("elsewhere")
    for kind, parts in models.items():
        for part in parts:
            part.save_pretrained(root / kind / "model")
    script = root / "elsewhere.py"
    script.write_text(ELSEWHERE, encoding="utf-8")
    command = [sys.executable, "-P", *map(str, (script, root, scan, *KINDS))]
    environment = {"HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_loads_without_the_package(kind: str, models: dict[str, tuple[Any, Any]], elsewhere: Path, scan: Path) -> None:
    (model, processor), folder, again = models[kind], elsewhere / kind / "model", elsewhere / kind / "out-again"
    found = load_file(elsewhere / kind / "out")
    with torch.no_grad():
        if kind == "clip":
            output = model(**processor(volumes=scan, text=["Liver mass."]), return_loss=False)
            expected = (output.image_embeds, output.text_embeds)
        elif kind == "segmenter":
            inputs = processor(volumes=scan, text=["liver mass"])
            output = model(inputs["pixel_values"], inputs["input_ids"][None], inputs["attention_mask"][None])
            expected = (output.logits, output.presence)
        else:
            batch = processor([[{"role": "user", "content": "Where?"}]], [scan])
            expected = (model(**batch).logits, model.generate(**batch, max_new_tokens=4).float())
    if kind == "segmenter":  # logits of about 5, rounded otherwise in another process; worst seen 3e-6
        torch.testing.assert_close((found["first"], found["second"]), expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found["first"], expected[0]) and torch.equal(found["second"], expected[1])
    # What was saved there loads here and there.
    assert (again / CODE_FILE).read_bytes() == (folder / CODE_FILE).read_bytes()
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()
    assert (again / "processor_config.json").read_text() == (folder / "processor_config.json").read_text()


def test_the_loaders_of_the_package_run_no_code_of_a_folder(tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    for part in load_clip(tiny_models.clip):
        part.save_pretrained(tmp_path)
    (tmp_path / CODE_FILE).write_text("raise SystemExit('was run')\n", encoding="utf-8")
    assert (
        type(load_clip(tmp_path)[0]) is type(Med3DCLIP.from_pretrained(tmp_path)) is type(AutoModel.from_pretrained(tmp_path)) is Med3DCLIP
    )
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(load_clip(tmp_path)[1])


def test_the_copied_code_holds_models_and_readers_of_scans_only() -> None:
    modules = re.findall(r"^SOURCES\[NAME \+ '(.*)'\] = ", code(), re.M)
    parts = {"encoders", "files", "formats", "geometry", "models", "preprocessing", "projectors", "recipes", "special_tokens", "volume"}
    assert {module.split(".")[1] for module in modules if module} == parts
    assert not re.findall(r"^\s*(?:import|from) (?:med3dvlm\b|gradio|deepspeed).*", code(), re.M)
