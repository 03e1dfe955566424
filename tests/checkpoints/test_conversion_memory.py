"""Converting and merging large checkpoints takes little memory, measured in separate processes on files of zeros."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from med3dvlm.checkpoints import convert_published, load_vlm, model_type
from tests import released
from tests.golden_weights import manifest

CHILD = """
import med3dvlm.checkpoints
from transformers import Qwen2ForCausalLM
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # count from here
before = peak()
{action}
print(before, peak())
"""


def peak_memory(action: str) -> tuple[int, int]:
    """Returns the largest resident memory of a process in bytes, before and after its work."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("{action}", action)],
        capture_output=True, text=True, timeout=900, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(int, done.stdout.split()[-2:])
    print(f"{before / 1e6:.0f} MB before, {after / 1e6:.0f} MB at most")
    return before, after


def sparse_vlm(folder: Path, shards: int) -> int:
    """Writes a Med3DVLM of about 0.8 GB of zeros in half precision as sparse files, and returns its size in bytes."""
    language = {
        "hidden_size": 1536,
        "intermediate_size": 8192,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    }
    released.vlm_settings(folder, **language)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", vocab_size=44000, **language))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    mixer = {name: shape for name, shape in manifest()["vlm_qwen2.5_7b"].items() if ".mm_projector." in name}
    shapes |= {name: [{1792: 768, 3584: 1536}.get(length, length) for length in shape] for name, shape in mixer.items()}
    shapes |= {name: shape for name, shape in manifest()["vlm_qwen2.5_7b"].items() if ".vision_tower." in name}
    total, index = 0, {}
    for number in range(shards):
        header, end = {}, 0
        for name in list(shapes)[number::shards]:
            start, end = end, end + 2 * int(torch.Size(shapes[name]).numel())
            header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [start, end]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            output.truncate(8 + len(text) + end)
        index |= dict.fromkeys(header, file)
        total += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_a_large_checkpoint_takes_little_memory(kind: str, tmp_path: Path) -> None:
    """Mapped pages that the kernel has not yet freed count as memory."""
    size = sparse_vlm(tmp_path / "released", 4)
    source = tmp_path / "released"
    if kind == "pickle":
        weights = {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        released.write_pickle(source / "model_with_lora.bin", weights)
        del weights
        source = source / "model_with_lora.bin"
    action = f"print(med3dvlm.checkpoints.convert_published({str(source)!r}, {str(tmp_path / 'ours')!r}, verify=True))"
    before, after = peak_memory(action)
    assert size > 0.75e9
    assert after - before < 0.75 * size  # 128 MiB of the source and of the result, a tensor of 135 MB beyond, the tokenizer
    assert model_type(tmp_path / "ours") == "med3dvlm"
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_merge_holds_its_base_model_in_memory_once(tmp_path: Path) -> None:
    size = sparse_vlm(tmp_path / "released", 2)
    convert_published(tmp_path / "released", tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    model, _ = load_vlm(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=r"language_model\..*_proj", init_lora_weights=False)).save_pretrained(
        tmp_path / "lora"
    )
    del model
    before, after = peak_memory(f"med3dvlm.checkpoints.merge_lora({str(tmp_path / 'lora')!r}, {str(tmp_path / 'merged')!r})")
    assert after - before < size + 0.3e9
    shutil.rmtree(tmp_path)
