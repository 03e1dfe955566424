"""Every stage under every launcher in bfloat16: it learns four studies by heart, as in float32, and resumes when killed.

Each stage starts from the bfloat16 output of the previous one, with tiny models, the real scripts and DeepSpeed's engine.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from med3dvlm.checkpoints import load_clip, load_language_model, load_vlm
from med3dvlm.datasets.conversations import ConversationDataset, ConversationOptions
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.training.trainer import COMPLETE
from tests.launching import REPOSITORY, launch

pytestmark = pytest.mark.slow
ENCODER = {"widths": [8, 8, 16, 24, 32], "stem_layers": 1, "layer_scale": 0.1, "stem_stride": 2}
BERT = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 256, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0,
}  # fmt: skip
PAIRS = (
    "--config", "stages/configs/smoke/stage1_siglip.yaml", "--text-encoder", "new", "--text-options", json.dumps(BERT), "--train-text",
    "true", "--cache-features", "false", "--encoder-options", json.dumps(ENCODER), "--train-sampling-strategy", "sequential",
)  # fmt: skip
QUESTIONS = ("--reports", 0, "--closed", 0, "--follow-ups", 0)
# stage -> its flags; {name} is the output folder of the stage of that name
STAGES: dict[str, tuple[object, ...]] = {
    "stage0_language_model": ("--config", "stages/configs/smoke/stage0_language_model.yaml", "--hidden-size", 64, *QUESTIONS),
    "stage1_siglip": PAIRS,
    "ct_clip": (*PAIRS, "--loss", "clip", "--train-split", "train"),
    "stage2_projector": (
        "--config", "stages/configs/smoke/stage2_projector.yaml", "--clip", "{stage1_siglip}", "--language-model",
        "{stage0_language_model}", "--standardise", "true", "--cache-features", "false", "--learning-rate", 0.003, *QUESTIONS,
    ),
    "stage3_lora": (
        "--config", "stages/configs/smoke/stage3_lora.yaml", "--model", "{stage2_projector}", "--lora-dropout", 0, "--merged",
        "{stage3_lora}/merged", "--closed", 0, "--follow-ups", 0,
    ),
}  # fmt: skip
STEPS = {stage: 30 for stage in STAGES} | {"stage1_siglip": 48, "ct_clip": 48}
EARLY = 5  # steps whose losses are compared
ZERO2 = ("--deepspeed", "ds_configs/zero2.json")
LAUNCHERS: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "deepspeed": ("deepspeed", 1, ZERO2),
    "deepspeed on two": ("deepspeed", 2, ZERO2),
    "python": ("python", 1, ()),
    "torchrun on two": ("torchrun", 2, ("--gradient-checkpointing", "true")),  # the text encoder has a pooler that never gets a gradient
    # Full determinism fills memory that nobody has written with NaN, which must not be taken for weights.
    "ZeRO-3 on two": ("deepspeed", 2, ("--deepspeed", "{zero3}", "--full-determinism", "true")),
    "ZeRO-3, offloading": ("deepspeed", 1, ("--deepspeed", "ds_configs/zero3_offload.json")),
}


@dataclass
class Trainer:
    """Runs a stage on four studies; `parents` holds the models that stages start from, by the stage that wrote them."""

    data: tuple[object, ...]
    root: Path
    parents: Path

    def __call__(self, stage: str, launcher: str, name: str, *flags: object, bf16: bool = True, kill_at: str | None = None) -> Path:
        program, processes, engine = LAUNCHERS[launcher]
        output = self.root / name / stage
        places = {other: self.parents / other for other in STAGES} | {stage: output, "zero3": self.root / "zero3.json"}
        is_place = re.compile(r"\{(stage|zero)\w+\}").match
        named = (str(flag).format(**places) if is_place(str(flag)) else flag for flag in (*STAGES[stage], *engine))
        flags = (
            "--learning-rate", 0.01, *named, *self.data, "--bf16", bf16, "--output-dir", output, "--per-device-train-batch-size",
            4 // processes, "--max-steps", STEPS[stage], "--save-steps", 1000, "--lr-scheduler-type", "constant", "--disable-tqdm", "true",
            *flags,
        )  # fmt: skip
        log, kill = self.root / f"{name}.log", None if kill_at is None else output / kill_at
        codes = launch(program, processes, f"stages/{stage}.py", *flags, log=log, kill_at=kill)
        if kill is None:
            assert codes == [0] * processes, log.read_text()[-5000:]
        else:
            assert codes[0] == -9, log.read_text()[-5000:]
        return output


@pytest.fixture(scope="module")
def train(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer whose parents are the models written under DeepSpeed on one process."""
    root = tmp_path_factory.mktemp("bfloat16")
    ids = [study.id for study in PreparedData(prepared).studies("train")]
    (root / "four.json").write_text(json.dumps({"train": ids[:4], "validation": ids[4:7]}))
    # The recipe keeps small tensors whole on every process, and here all are small: nothing would be shared out.
    engine = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (root / "zero3.json").write_text(json.dumps(engine))
    trainer = Trainer(("--data", prepared, "--split-file", root / "four.json"), root, root / "deepspeed")
    for stage in STAGES:
        trainer(stage, "deepspeed", "deepspeed", "--save-steps", STEPS[stage] // 2)
    return trainer


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def learned(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights and running statistics of a checkpoint as they would be saved in bfloat16."""
    found = {}
    for key, tensor in weights(checkpoint).items():
        kind, _, name = key.partition("/")
        if kind in ("weights", "buffers"):
            name = name.replace("modules_to_save.default.", "").replace(".default.", ".")  # as PEFT names what it saves
            found[name] = tensor.bfloat16() if kind == "weights" else tensor
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("stage", STAGES)
def test_zero3_on_two_processes_equals_zero2(stage: str, train: Trainer) -> None:
    """The engine partitions all weights; the saved model has them whole."""
    output = train(stage, "ZeRO-3 on two", "zero3", "--max-steps", EARLY)
    expected = losses(train(stage, "deepspeed on two", "zero2", "--max-steps", EARLY))
    assert losses(output) == pytest.approx(expected, abs=0.05 * expected[0])
    found, same = weights(output), weights(train.root / "zero2" / stage)
    shapes = {name: tensor.shape for name, tensor in same.items() if name in found or not name.endswith("lm_head.weight")}  # a tied head
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    record = json.loads((output / "run.json").read_text())
    assert record["parameters"] == json.loads((train.root / "zero2" / stage / "run.json").read_text())["parameters"]
    if stage == "stage3_lora":
        assert load_vlm(output / "merged")


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if not name.startswith("ZeRO-3")])
@pytest.mark.parametrize("stage", STAGES)
def test_four_studies_are_learnt_by_heart(stage: str, launcher: str, train: Trainer) -> None:
    """Losses fall to less than a tenth; those of the first steps differ from float32 by less than 5 % of the first loss."""
    output = train.parents / stage if launcher == "deepspeed" else train(stage, launcher, launcher.replace(" ", "_"))
    curve = losses(output)
    assert len(curve) == STEPS[stage] and min(curve[-3:]) < curve[0] / 10
    # Batch norm sees the volumes of one process, so that of two processes the losses are others than of one.
    reference = {1: "python", 2: "torchrun on two"}[LAUNCHERS[launcher][1]]
    exact = train.root / f"float32_{reference.split()[0]}" / stage
    if not exact.exists():
        train(stage, reference, exact.parent.name, "--max-steps", EARLY, bf16=False)
    expected = losses(exact)
    assert curve[:EARLY] == pytest.approx(expected, abs=0.05 * expected[0]), expected


def test_only_trainable_weights_change(train: Trainer) -> None:
    """Compared are DeepSpeed's float32 weights half-way and the saved bfloat16 weights at the end."""
    found = {
        stage: (learned(train.parents / stage / f"checkpoint-{STEPS[stage] // 2}"), weights(train.parents / stage)) for stage in STAGES
    }
    for stage, (_, after) in found.items():
        buffers = {name for name in after if "running_" in name} | ({"logit_bias"} if stage == "ct_clip" else set())
        floating = {name: tensor.dtype for name, tensor in after.items() if tensor.is_floating_point() and name not in buffers}
        assert set(floating.values()) == {torch.bfloat16}, stage
        assert all(after[name].dtype == torch.float32 for name in buffers), stage
        assert all(tensor.isfinite().all() for tensor in after.values()), stage
    idle = (".depth.0.bias", ".height.0.bias", ".width.0.bias")  # batch norm takes away what the biases before it add
    for stage in ("stage0_language_model", "stage1_siglip", "ct_clip"):
        before, after = found[stage]
        still = {name for name in set(before) - changed(before, after) if not name.endswith(idle) and "pooler" not in name}
        assert still <= {"logit_bias", "logit_scale"}, (stage, still)  # their steps may be too small for bfloat16; DeepSpeed's copies moved
    before, after = found["stage2_projector"]
    projector = {name for name in after if name.startswith("projector.")}
    assert changed(before, after) == projector == {name for name in before if not name.startswith("vision_encoder.")}
    clip, language_model = weights(train.parents / "stage1_siglip"), weights(train.parents / "stage0_language_model")
    for name, tensor in after.items():
        part, _, rest = name.partition(".")
        if part == "vision_encoder":
            assert torch.equal(tensor, clip[name]), name
        if part == "language_model" and rest in language_model:
            assert torch.equal(tensor, language_model[rest]), name
    before, after = found["stage3_lora"]
    assert set(after) == {name for name in before if ".vision_encoder." not in name}  # whose running statistics stay
    before = {name: before[name] for name in after}
    assert changed(before, after) == set(after) and all("lora_" in name or "projector" in name for name in after)


def test_models_saved_in_bfloat16_load_in_one_type_and_answer(train: Trainer) -> None:
    clip, *_ = load_clip(train.parents / "stage1_siglip")
    language_model, _ = load_language_model(str(train.parents / "stage0_language_model"))
    model, processor = load_vlm(train.parents / "stage3_lora" / "merged")
    for part in (clip, language_model, model):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    data = PreparedData(train.data[1])  # type: ignore[arg-type]
    study = data.studies("train")[0]
    messages = [[{"role": "user", "content": next(question.text for question in data.questions("train") if question.study == study.id)}]]
    batch: Any = processor(messages, [data.volume(study)])
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize(
    ("stage", "launcher"), [("stage1_siglip", "deepspeed"), ("stage3_lora", "deepspeed"), ("stage2_projector", "python")]
)
def test_a_killed_training_resumes(stage: str, launcher: str, train: Trainer) -> None:
    """Losses after the kill equal those of an uninterrupted run; the kill follows a complete checkpoint."""
    flags = ("--max-steps", 9, "--save-steps", 3)
    name = f"{launcher.split()[0]}_{stage}"
    whole = train(stage, launcher, f"whole_{name}", *flags)
    killed = train(stage, launcher, f"killed_{name}", *flags, kill_at=f"checkpoint-3/{COMPLETE}")
    assert not (killed / "run.json").exists()
    assert train(stage, launcher, f"killed_{name}", *flags) == killed
    assert "continuing from" in (train.root / f"killed_{name}.log").read_text()
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-3)


def test_the_validation_loss_equals_plain_loops(train: Trainer) -> None:
    """It is computed for three rows in batches of 2, and of 1 on two processes with ZeRO-3."""
    flags = ("--max-steps", 1, "--learning-rate", 0, "--eval-strategy", "steps", "--eval-steps", 1, "--loss-weighting", "conversation")
    alone = train("stage2_projector", "python", "validated", *flags, "--per-device-eval-batch-size", 2, bf16=False)
    shared = train("stage2_projector", "ZeRO-3 on two", "validated3", *flags, "--per-device-eval-batch-size", 1, bf16=False)
    found = [json.loads((output / "validation_losses.jsonl").read_text())["eval_loss"] for output in (alone, shared)]

    model, processor = load_vlm(alone, dtype=torch.float64)
    data = PreparedData(train.data[1], split_file=train.data[3])  # type: ignore[arg-type]
    rows = ConversationDataset(data, "validation", ConversationOptions(False, reports=0, closed=0, follow_ups=0))
    expected = []
    for row in range(len(rows)):
        for messages in rows.conversations(row):
            coded = processor.encode(messages)
            ids, labels = torch.tensor(coded["input_ids"]), coded["labels"]
            pixels = load_volumes(data, [rows.studies[row]])
            with torch.no_grad():
                logits = model(ids[None], torch.ones_like(ids)[None], pixels).logits[0].log_softmax(-1)
            terms = [-float(logits[place - 1, label]) for place, label in enumerate(labels) if label != -100]
            expected.append(sum(terms) / len(terms))
    assert len(rows) == 3 and found == pytest.approx([sum(expected) / len(expected)] * 2, rel=1e-5)


def test_the_validation_loss_of_pairs_equals_plain_loops(train: Trainer) -> None:
    """Three pairs form one batch, whose loss is computed by SigLIP's formula."""
    flags = ("--max-steps", 1, "--learning-rate", 0, "--eval-strategy", "steps", "--eval-steps", 1)
    found = []
    for launcher, size in (("python", 2), ("ZeRO-3 on two", 1)):
        output = train("stage1_siglip", launcher, f"pairs_{size}", *flags, "--per-device-eval-batch-size", size, bf16=False)
        found.append(json.loads((output / "validation_losses.jsonl").read_text())["eval_loss"])
        model, processor = load_clip(output, dtype=torch.float64)
        data = PreparedData(train.data[1], split_file=train.data[3])  # type: ignore[arg-type]
        studies = data.studies("validation")
        coded = processor.tokenizer([study.report for study in studies], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            images = model.encode_image(load_volumes(data, studies).double())
            texts = model.encode_text(coded["input_ids"], coded["attention_mask"])
            scale, bias = float(model.logit_scale.exp()), float(model.logit_bias)
        total = 0.0
        for one, image in enumerate(images):
            for other, text in enumerate(texts):
                logit = scale * float(image @ text) + bias
                total += math.log1p(math.exp(-logit if one == other else logit))
        assert found[-1] == pytest.approx(total / 3, rel=1e-4), launcher
