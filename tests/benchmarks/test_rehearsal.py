"""The rehearsal: its script with stand-in programs, its models at tiny widths, its report from files with known figures."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, DistilBertConfig, DistilBertModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks import rehearsal_models, rehearsal_report
from med3dvlm import Med3DCLIP, Med3DCLIPConfig, Med3DVLM, Med3DVLMProcessor
from med3dvlm.checkpoints import convert_published, load_clip, load_language_model
from med3dvlm.datasets.store import PreparedData
from med3dvlm.encoders import count_parameters
from tests.stand_ins import run_script

SCRIPT = "benchmarks/rehearsal.sh"


def steps_begun(folder: Path) -> list[str]:
    commands = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    return [command[3] for command in commands if command[1] == "stages/demo/timed.py"]


def test_the_script_runs_the_steps_that_the_report_asks_for(repository: Path, tmp_path: Path) -> None:
    done, commands = run_script(repository, tmp_path, SCRIPT, "--steps", "5", "--processes", "3")
    assert done.returncode == 0, done.stderr
    assert steps_begun(tmp_path) == list(rehearsal_report.STEPS)
    assert commands[-1][1] == "benchmarks/rehearsal_report.py"
    for name in rehearsal_report.STAGES:
        (command,) = (command for command in commands if command[0] == "deepspeed" and f"stages/{name}_" in command[3])
        assert command[1:3] == ["--num_accelerators", "3"] and "--bf16" not in command
        assert command[5].startswith("stages/configs/paper/") and command[command.index("--max-steps") + 1] == "5"


def test_the_report_is_written_when_a_step_fails(repository: Path, tmp_path: Path) -> None:
    done, commands = run_script(repository, tmp_path, SCRIPT, FAILS="stage2")
    assert done.returncode == 1
    assert steps_begun(tmp_path)[-1] == "stage2" and commands[-1][1] == "benchmarks/rehearsal_report.py"
    again, _ = run_script(repository, tmp_path, SCRIPT, "--step", "5")
    assert again.returncode == 2 and "unknown: --step; known: --tiny, --layers N" in again.stderr


@pytest.mark.parametrize(
    ("layers", "gigabytes", "gflops", "fit"),
    [
        (2, 20.0, 200.0, (2, 8)),
        (2, 15.0, 200.0, (1, 8)),  # 4.5 GB a process beside 3: 2.2 for the vocabulary's two matrices, which are held twice
        (40, 90.0, 1e6, (40, 8)),
        (2, 20.0, 40.0, (1, 6)),  # 2 x 450 tokens x 4 x 0.5055 G = 1820 GFLOP a step: 45 s, of 300
        (2, 20.0, 4.0, (1, 2)),
    ],
)
def test_layers_and_steps_follow_memory_and_speed(layers: int, gigabytes: float, gflops: float, fit: tuple[int, int]) -> None:
    assert rehearsal_models.fitting(layers, 8, 2, gigabytes, gflops) == fit


def test_a_plan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal_models, "bfloat16_speed", lambda: 1.0)
    assert rehearsal_models.plan(tmp_path, 2, 8, 2) == (1, 2)
    assert "Asked for were 2 layers and 8 steps" in json.loads((tmp_path / "plan.json").read_text())["reduced"]
    monkeypatch.setattr(rehearsal_models, "bfloat16_speed", lambda: 1e6)
    assert rehearsal_models.plan(tmp_path, 2, 8, 2) == (1, 2)


def test_the_models_have_the_published_sizes() -> None:
    """ClinicalBERT's size is counted in tests/stages/test_configs.py; that of Qwen2.5-7B is on its model card."""
    with torch.device("meta"):
        text = DistilBertModel(DistilBertConfig(**rehearsal_models.CLINICAL_BERT))
        language = Qwen2ForCausalLM(Qwen2Config(**rehearsal_models.QWEN_7B, num_hidden_layers=28))
    assert count_parameters(text)["trainable"] == 134_734_080
    assert count_parameters(language)["trainable"] == 7_615_616_512


def test_the_models_are_written_as_a_hub_has_them(prepared: Path, tmp_path: Path) -> None:
    data = PreparedData(prepared)
    rehearsal_models.write_text_encoder(data, tmp_path / "text", tiny=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    ids = tokenizer(data.studies("train")[0].report)["input_ids"]
    assert len(tokenizer) == AutoModel.from_pretrained(tmp_path / "text").config.vocab_size == 1000
    assert ids[0] == tokenizer.cls_token_id and len(set(ids)) > 10 and tokenizer.unk_token_id not in ids

    rehearsal_models.write_language_model(data, tmp_path / "language", layers=1, tiny=True)
    model, tokenizer = (kind.from_pretrained(tmp_path / "language") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 152064 and model.config.num_hidden_layers == 1
    assert abs(model.lm_head.weight.detach().float().std().item() / 0.02 - 1) < 0.01
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [151643, 151644, 151645]
    text = "Which organ holds the mass of 12 mm? Leber, größer"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    processor = Med3DVLMProcessor(data.processor, tokenizer)
    assert processor.image_token_id == 151665 and tokenizer.eos_token_id == model.config.eos_token_id == 151645


def test_models_survive_the_published_names(tiny_models: SimpleNamespace, tmp_path: Path) -> None:
    """The stem has an activation, so its layers are numbered with gaps, unlike the released ones."""
    clip, processor = load_clip(tiny_models.clip)
    volumes, tokenizer = processor.image_processor, processor.tokenizer
    clip = Med3DCLIP(Med3DCLIPConfig("dcformer_nano", size=volumes.size, text_config=clip.config.text_config, projection_dim=16))
    language_model, _ = load_language_model(str(tiny_models.language_model))
    language_model.resize_token_embeddings(len(tokenizer) + 2)  # room for both image tokens
    vlm = Med3DVLM.from_parts(clip, language_model, Med3DVLMProcessor(volumes, tokenizer).image_token_id)
    for kind, model, text in (("clip", clip, tiny_models.text_encoder), ("vlm", vlm, None)):
        source, published, ours = (tmp_path / f"{kind}{step}" for step in ("", "_published", "_ours"))
        for part in (model, tokenizer):
            part.save_pretrained(source)
        rehearsal_models.write_published(source, published)
        convert_published(published, ours, text_encoder=text, verify=True)
        rehearsal_models.require_same(source, ours)
        weights = load_file(ours / "model.safetensors")
        name = "vision_encoder.stages.0.1.scale"
        save_file(weights | {name: weights[name] + 1}, ours / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"differ in 1 tensors, as in .*vision.*encoder\.s1\.0\.scale"):
            rehearsal_models.require_same(source, ours)


def write_run(root: Path, codes: dict[str, int] | None = None, last_loss: float = 1.5) -> None:
    """Writes three trainings of 4 steps; one was killed after 2 steps and its clock started again."""
    lines = [
        {"step": step, "seconds": 2.0, "peak_rss_gb": 1.0, "processes": [["one.py", 0.7], ["two.py", 0.3]], "code": 0}
        for step in rehearsal_report.STEPS
    ]
    lines += [{"step": "ask_merged", "seconds": 3.0, "peak_rss_gb": 0.5, "processes": [], "code": 0}]
    lines += [{**lines[0], "step": step, "code": code} for step, code in (codes or {}).items()]
    (root / "seconds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clock = {1: 10.0, 2: 14.0, 3: 9.0, 4: 15.0}
    for name in rehearsal_report.STAGES:
        (root / name).mkdir(exist_ok=True)
        losses = [
            {"step": step, "loss": last_loss if step == 4 else 3.0, "train_runtime": clock[step], "num_input_tokens_seen": 100 * step}
            for step in clock
        ]
        (root / name / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
        settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        settings |= {} if name == "stage1" else {"max_length": 1024}
        record = {"settings": settings, "processes": 2, "parameters": {"trainable": 1, "frozen": 2}}
        (root / name / "run.json").write_text(json.dumps(record))
    plan = {"layers": 1, "steps": 4, "processes": 2, "bfloat16_gflops": 9.0, "free_gb": 12.0, "reduced": "Asked for were more."}
    (root / "plan.json").write_text(json.dumps(plan))


def report(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any], str]:
    code = rehearsal_report.main(["--root", str(root)])
    return code, json.loads((root / "report.json").read_text()), (root / "report.md").read_text()


def test_figures_of_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    code, figures, text = report(tmp_path, monkeypatch)
    assert code == 0 and figures["passed"] and "Every step passed." in text
    stage = figures["stages"]["stage2"]
    assert (stage["first_loss"], stage["last_loss"], stage["steps"]) == (3.0, 1.5, 4)
    assert stage["seconds_a_step"] == 5.0  # the median of 4 and 6
    assert stage["volumes_a_second"] == 8 / 5 and stage["tokens_a_second"] == 200 / 10
    assert "tokens_a_second" not in figures["stages"]["stage1"]  # there the Trainer counts voxels
    assert figures["steps"]["ask_merged"] == {
        "code": 0,
        "seconds": 5.0,
        "peak_rss_gb": 1.0,
        "processes": [["one.py", 0.7], ["two.py", 0.3]],
    }
    assert figures["seconds"] == 2.0 * len(rehearsal_report.STEPS) + 3.0 and figures["versions"]["torch"] and figures["cores"]
    assert "one.py 0.70, two.py 0.30" in text and "9.0 GFLOP/s" in text and "Asked for were more." in text


def test_failed_checks_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, figures, text = report(tmp_path, monkeypatch)  # nothing has run
    assert code == 1 and figures["not_run"] == list(rehearsal_report.STEPS) and "NOT PASSED. Not run: phantoms, prepare" in text
    write_run(tmp_path, {"stage3": -9})
    code, figures, text = report(tmp_path, monkeypatch)
    assert code == 1 and "NOT PASSED. Failed: stage3." in text and figures["steps"]["stage3"]["code"] == -9
    write_run(tmp_path, last_loss=math.nan)
    code, figures, text = report(tmp_path, monkeypatch)
    assert code == 1 and "Failed: stage1 (a loss is not finite), stage2" in text
