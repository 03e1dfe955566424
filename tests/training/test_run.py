"""Arguments, what trains, and a trainer that is interrupted: checked on a model of four weights, whose every step can be followed."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import med3dvlm.training.arguments
import med3dvlm.training.environment
from med3dvlm import Med3DCLIP, Med3DVLM, programs
from med3dvlm.training.arguments import StageArguments, parse_arguments
from med3dvlm.training.environment import environment
from med3dvlm.training.run import (
    finish,
    lora_targets,
    run_training,
    train_only,
)
from med3dvlm.training.trainer import COMPLETE, IDENTITY, StageTrainer, WholeBatches


@dataclass
class ToyArguments(StageArguments):
    colour: str = field(default="red", metadata={"help": "of the toy, 100 % sure"})
    speed: float | None = None


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "data: there\ncolour: green\nspeed: 2\nlearning_rate: 1e-3\nmax_steps: 7\nuse_cpu: true\n")
    assert parse_arguments(ToyArguments, ["--data", "here", "--use-cpu", "true"]).colour == "red"
    arguments = parse_arguments(ToyArguments, ["--config", config])
    assert (arguments.data, arguments.colour, arguments.speed, arguments.max_steps) == ("there", "green", 2, 7)
    assert arguments.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    arguments = parse_arguments(ToyArguments, ["--max-steps", "9", f"--config={config}", "--colour", "blue"])
    assert (arguments.data, arguments.colour, arguments.max_steps) == ("there", "blue", 9)


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("data: x\ncolor: blue\n", [], "unknown keys color; did you mean colour?"),
        ("data: x\nzzz: 1\n", [], "unknown keys zzz; see --help"),
        ("data: x\n1: 2\n", [], "unknown keys 1;"),
        ("data: x\n", ["--color", "blue"], "unknown: --color blue; did you mean colour?"),
        ("data: x\n", ["--color=blue"], "unknown: --color=blue; did you mean colour?"),
        ("data: x\n", ["--col", "blue"], "unknown: --col blue"),  # no guessing from the first letters
        ("data: x\n", ["blue"], "unknown: blue; every setting is --name value"),
        ("data: x\n", ["--max-steps", "many"], "invalid int value: 'many'"),
        ("data: x\nmax_steps: many\n", [], "invalid int value: 'many'"),
        ("data: x\nsave_total_limit: 1\n", [], "save_total_limit is 1 but must be at least 2: while a checkpoint"),
        ("data: x\nmax_steps: [1]\n", [], "toy.yaml: max_steps is [1] but must be int"),
        ("data: x\nmax_steps: 1.5\n", [], "max_steps is 1.5 but must be int"),
        ("data: x\nlearning_rate: null\n", [], "learning_rate is None but must be float"),
        ("data: x\nlearning_rate: {a: 1}\n", [], "learning_rate is {'a': 1} but must be float"),
        ("data: x\neval_strategy: no\n", [], "eval_strategy is False but must be IntervalStrategy | str"),
        ("data: 5\n", [], "data is 5 but must be str"),
        ("colour: blue\n", [], "--data is missing"),
        ("- data\n", [], "must hold lines of `name: value`, not a list"),
        ("data: {\n", [], "toy.yaml is not valid YAML"),
        ("data: x\nlabel_smoothing_factor: 0.1\n", [], "label_smoothing_factor is 0.1 but must be 0.0: the models compute their losses"),
        ("data: x\nfp16: true\nuse_cpu: true\n", [], "fp16 is True but must be false: the models compute in float32 or bfloat16"),
        ("data: x\n", ["--neftune-noise-alpha", "5"], "neftune_noise_alpha is 5.0 but must be none"),
        (
            "data: x\n",
            ["--train-sampling-strategy", "group_by_length"],
            "is 'group_by_length' but must be random or sequential: others need lengths",
        ),
        ("data: x\nbf16: true\n", [], "no GPU here that computes in bfloat16; pass --use-cpu true to train on the CPU, or --bf16 false"),
        (
            "data: x\nuse_cpu: true\nbf16: true\ndeepspeed: {folder}/off.json\n",
            [],
            "bf16.enabled=False but bf16|bf16_full_eval=True; write",
        ),
        ("data: x\ndeepspeed: nowhere.json\n", [], "nowhere.json, DeepSpeed's configuration, is neither a file nor one of the package"),
        ("data: x\nuse_cpu: true\ndeepspeed: {folder}/adam.json\n", [], "adam.json has a part 'optimizer': it would let biases"),
        ("data: x\naverage_tokens_across_devices: false\n", [], "average_tokens_across_devices is False but must be true"),
        ("data: x\n", ["--accelerator-config", '{"split_batches": true}'], "accelerator_config is"),
        (
            "data: x\nuse_cpu: true\ndeepspeed: {folder}/five.json\n",
            [],
            "zero_optimization.stage is 5 but must be one of 1, 2, 3; where nothing",
        ),
        ("data: x\n", ["--config"], "--config: expected one argument"),
    ],
)
def test_a_wrong_setting_is_named_in_a_sentence(
    text: str, flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(med3dvlm.training.arguments, "is_torch_bf16_gpu_available", lambda: False)
    (tmp_path / "off.json").write_text('{"bf16": {"enabled": false}, "zero_optimization": {"stage": 2}}')
    (tmp_path / "adam.json").write_text('{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    (tmp_path / "five.json").write_text('{"zero_optimization": {"stage": 5}}')
    with pytest.raises(SystemExit) as stop:
        parse_arguments(ToyArguments, ["--config", yaml_file(tmp_path, text.replace("{folder}", str(tmp_path))), *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) <= 2  # how it is called, and what is wrong


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "accelerate launch brings --mixed_precision fp16, but bf16 is False"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "accelerate launch brings --mixed_precision bf16, but bf16 is False"),
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch brings an engine of its own"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch brings an engine of its own"),
    ],
)
def test_what_accelerate_launch_brings_is_refused(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(ToyArguments, ["--data", "x", "--use-cpu", "true"])
    assert sentence in capsys.readouterr().err


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(ToyArguments, ["--config", "nowhere.yaml", "--data", "x"])
    assert "nowhere.yaml is neither a file nor a recipe of the package; those are ablation/stage1_siglip, " in capsys.readouterr().err


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(ToyArguments, ["--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n  {name}") for name in ("--config FILE", "--data", "--exclude-failures", "--colour", "--learning-rate")]
    assert places == sorted(places)  # ours first


def test_train_only_freezes_by_name() -> None:
    model = nn.ModuleDict({"eye": nn.Linear(2, 2), "mouth": nn.Linear(2, 2)})
    model["eye"].requires_grad_(False)
    assert train_only(model, lambda name: name.startswith("eye.")) == ["eye.weight", "eye.bias"]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    with pytest.raises(ValueError, match="no parameter is left to train; the names begin with: eye, mouth"):
        train_only(model, lambda name: name.startswith("nose."))


def test_lora_goes_to_every_linear_layer_of_the_language_model(tiny_models: Any) -> None:
    """Found here by looking at each module, not by its name."""
    import re

    model = Med3DVLM.from_pretrained(tiny_models.vlm)
    pattern = re.compile(lora_targets(model))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.startswith("language_model.") and "lm_head" not in name}
    assert {name for name, _ in model.named_modules() if pattern.fullmatch(name)} == expected
    assert len(expected) == 7 * model.config.text_config.num_hidden_layers


def toy_arguments(folder: Path, **settings: Any) -> ToyArguments:
    fixed = {"use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "data": "x"}
    return ToyArguments(str(folder), **fixed | settings)


def test_of_several_gpus_one_process_takes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer would wrap the model in DataParallel, which these models do not survive."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 4))  # on the CPU transformers counts none
    arguments = toy_arguments(tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.per_device_train_batch_size
    assert "4 GPUs are visible" in caplog.text and "start the stage with `deepspeed` or `torchrun`" in caplog.text


def test_tensors_of_fewer_than_two_dimensions_do_not_decay(tiny_models: Any, tmp_path: Path) -> None:
    """open_clip's rule; the names show what transformers' own, by name, would let decay."""
    model = Med3DCLIP.from_pretrained(tiny_models.clip)
    trainer = StageTrainer(model=model, args=toy_arguments(tmp_path, weight_decay=0.1), train_dataset=Rows())
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(one)]: group["weight_decay"] for group in trainer.optimizer.param_groups for one in group["params"]}
    assert decays == {name: 0.1 if len(parameter.shape) > 1 else 0.0 for name, parameter in model.named_parameters()}
    for name in ("logit_scale", "vision_encoder.stem.0.depth.1.weight", "vision_encoder.stages.0.1.scale"):
        assert decays[name] == 0.0


def test_weights_that_train_are_float32_and_the_others_stay(tmp_path: Path) -> None:
    model = nn.ModuleDict({"frozen": nn.Linear(2, 2), "trained": nn.Linear(2, 2)}).bfloat16()
    model["frozen"].requires_grad_(False)
    StageTrainer(model=model, args=toy_arguments(tmp_path), train_dataset=Rows())
    assert {name: parameter.dtype for name, parameter in model.named_parameters() if name.endswith("weight")} == {
        "frozen.weight": torch.bfloat16,
        "trained.weight": torch.float32,
    }


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """13 rows, each of which says its number and the epoch that it was drawn for."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 13

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = torch.randn(4, generator=torch.Generator().manual_seed(100 * self.epoch + index))
        return {"row": torch.tensor([self.epoch, index]), "x": value}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 1)
        self.seen: list[list[list[int]]] = []  # by step: (epoch, number) of its rows

    def forward(self, row: Tensor, x: Tensor) -> dict[str, Tensor]:
        self.seen.append(row.tolist())
        return {"loss": (self.linear(nn.functional.dropout(x, 0.3)) - 1).square().mean()}


class StopAfter(TrainerCallback):
    """Stops after the step as a signal would: without a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder: Path, stop_after: int | None = None, data: str = "f1", weights: str = "w1", **settings: Any) -> Toy:
    """Ten steps of four rows in epochs of four steps, a checkpoint every second, a constant rate of learning."""
    values = {"max_steps": 10, "save_steps": 2, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    values |= settings
    arguments = toy_arguments(folder, **values)
    model = Toy()
    trainer = StageTrainer(model=model, args=arguments, train_dataset=Rows())
    if stop_after is not None:
        trainer.add_callback(StopAfter(stop_after))
        with pytest.raises(KeyboardInterrupt):
            run_training(trainer, arguments, data, eye=weights)
    else:
        run_training(trainer, arguments, data, eye=weights)
    return model


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_a_training_interrupted_inside_an_epoch_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Rows, their order, their epoch, dropout, losses and weights, bit for bit; from checkpoint 6, the second step of the second epoch."""
    whole = train(tmp_path / "whole")
    assert [rows[0][0] for rows in whole.seen] == [0] * 4 + [1] * 4 + [2] * 2
    first, second = ([index for rows in whole.seen[step : step + 4] for _, index in rows] for step in (0, 4))
    assert set(first) == set(second) == set(range(13)) and len(first) == len(second) == 16 and first != second

    train(tmp_path / "stopped", stop_after=7)
    assert [step for step, _ in losses(tmp_path / "stopped")] == list(range(1, 7))
    again = train(tmp_path / "stopped")
    assert again.seen == whole.seen[6:]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert torch.equal(again.linear.weight, whole.linear.weight)


@pytest.mark.slow
def test_so_does_one_on_two_processes(tmp_path: Path, shell: Callable[..., str], free_port: str) -> None:
    shell("python", "tests/drivers/two_processes.py", tmp_path, free_port)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert [rows[0][0] for rows in rank["whole"]] == [0] * 4 + [1] * 4 + [2] * 2
        assert rank["again"] == rank["whole"][6:]
        assert rank["weights"] == [ranks[0]["weights"][0]] * 2
    first, second = ([index for rank in ranks for rows in rank["whole"][step : step + 4] for _, index in rows] for step in (0, 4))
    assert set(first) == set(second) == set(range(13)) and first != second
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_losses_after_the_checkpoint_are_not_written_twice(tmp_path: Path) -> None:
    train(tmp_path, stop_after=5)
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')  # logged, then killed before checkpoint 6
    train(tmp_path)
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 11))
    assert all(loss < 99 for _, loss in losses(tmp_path))


@pytest.mark.parametrize("unmarked", [[], ["checkpoint-6"], ["checkpoint-4", "checkpoint-6"]])
def test_a_checkpoint_without_its_mark_is_not_used(unmarked: list[str], tmp_path: Path) -> None:
    train(tmp_path, stop_after=7, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    for name in unmarked:
        (tmp_path / name / COMPLETE).unlink()
    model = train(tmp_path, save_total_limit=2)
    assert len(model.seen) == {0: 4, 1: 6, 2: 10}[len(unmarked)]
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 11))


def test_a_finished_training_started_again_does_nothing(tmp_path: Path) -> None:
    """Ten steps are two epochs and a half: the trainer by itself would take an eleventh."""
    whole, before, said = train(tmp_path), losses(tmp_path), (tmp_path / "run.json").read_bytes()
    again = train(tmp_path)
    assert again.seen == [] and losses(tmp_path) == before and (tmp_path / "run.json").read_bytes() == said
    assert torch.equal(again.linear.weight, whole.linear.weight)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["steps"], record["settings"]["max_steps"]) == (10, 10)
    (tmp_path / "run.json").unlink()  # killed before it was written
    assert train(tmp_path).seen == [] and json.loads((tmp_path / "run.json").read_text())["steps"] == 10
    assert len(train(tmp_path, max_steps=12).seen) == 2  # more steps may be asked for later
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": "f2"}, "data"),
        ({"weights": "w2"}, "eye"),
        ({"learning_rate": 0.2, "seed": 7}, "learning_rate and seed"),
        ({"colour": "blue"}, "colour"),
        ({"per_device_train_batch_size": 2}, "batch_size"),
        ({"data": "f2", "max_steps": 3}, "data"),  # though there is nothing left to do
    ],
)
def test_a_checkpoint_of_another_training_is_not_continued(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Nor deleted: neither a whole one nor one that was not written to its end."""
    train(tmp_path, max_steps=4)
    (tmp_path / "checkpoint-4" / COMPLETE).unlink()
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(ValueError, match=f"holds a training with another {named}: .* then, .* now; start it as it was begun, delete it or"):
        train(tmp_path, **{"max_steps": 4, **change})
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_what_changes_nothing_that_is_learned_may_change(tmp_path: Path) -> None:
    """Where and how often it is saved and logged, how long it goes on, and how a batch is made up."""
    train(tmp_path / "one", stop_after=3)
    (tmp_path / "one").rename(tmp_path / "two")
    changes = {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "cache_features": True}
    train(tmp_path / "two", max_steps=5, **changes)
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 2, 3, 4, 5]


def test_checkpoints_of_unknown_origin_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=f"holds a model or checkpoints but no {IDENTITY}"):
        train(tmp_path)
    assert (tmp_path / "checkpoint-8" / "model.safetensors").read_text() == "precious"
    (tmp_path / "checkpoint-8").rename(tmp_path / "checkpoint-best")  # no name of the trainer's
    assert len(train(tmp_path, max_steps=2).seen) == 2 and (tmp_path / "checkpoint-best").is_dir()


def test_settings_may_be_mended_before_the_first_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, stop_after=1)
    (tmp_path / "run.json").write_text("{}")  # of a training whose checkpoints were deleted
    train(tmp_path, stop_after=1, learning_rate=0.2)
    assert json.loads((tmp_path / IDENTITY).read_text())["learning_rate"] == 0.2 and not (tmp_path / "run.json").exists()


def test_the_record_of_a_run(tmp_path: Path, repository: Path) -> None:
    started = time.perf_counter()
    train(tmp_path, max_steps=2)
    elapsed = time.perf_counter() - started
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 0.1 and record["settings"]["data"] == "x"
    assert (record["data_fingerprint"], record["processes"], record["steps"]) == ("f1", 1, 2)
    assert record["parameters"] == {"trainable": 5, "frozen": 0}
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert 0 <= record["seconds"] <= elapsed + 0.05  # rounded to tenths
    head = repository / ".git"
    assert (record["commit"] is not None and len(record["commit"]) == 40) == head.exists()


def test_a_package_in_somebody_elses_repository_has_no_commit_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "venv" / "site-packages" / "med3dvlm"
    package.mkdir(parents=True)
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(med3dvlm.training.environment, "__file__", str(package / "training.py"))
    assert environment()["commit"] is None


def test_a_schedule_that_is_bent_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a cosine over 4 steps nothing is left after them; over 8, half of the rate."""
    train(tmp_path, max_steps=4, lr_scheduler_type="cosine")
    train(tmp_path, max_steps=8, lr_scheduler_type="cosine")
    assert "begun for 4 steps and now takes 8: at step 4 the learning rate goes from 0 to 0.05" in caplog.text
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    cosine = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(4, 8)]
    assert rates[4:] == pytest.approx(cosine)
    caplog.clear()
    assert train(tmp_path, max_steps=8, lr_scheduler_type="cosine").seen == []  # it is finished
    train(tmp_path / "constant", max_steps=4)
    train(tmp_path / "constant", max_steps=8)
    assert "learning rate goes" not in caplog.text


@pytest.mark.parametrize(("rows", "batch", "drop", "length"), [(13, 4, False, 16), (12, 4, False, 12), (13, 4, True, 12), (3, 8, False, 8)])
def test_an_epoch_is_filled_up_to_whole_batches(rows: int, batch: int, drop: bool, length: int) -> None:
    for seed in (None, 5):
        order = WholeBatches(rows, batch, seed, drop)
        first = list(order)
        assert len(order) == len(first) == length and first[rows:] == (first[:rows] * length)[: max(0, length - rows)]
        assert sorted(first[:rows]) == sorted(set(first[:rows])) and (first == sorted(first)) == (seed is None and length <= rows)
        order.set_epoch(1)
        assert (list(order) == first) == (seed is None)
    with pytest.raises(ValueError, match="dataloader_drop_last leaves none"):
        WholeBatches(3, 4, None, True)


def test_the_record_does_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


@pytest.mark.parametrize(("spoilt", "stopped_at"), [("loss", 7), ("gradient", 6)])
def test_a_training_that_diverges_stops_before_it_is_saved(
    spoilt: str, stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints come every second step: the last good one is that of step 4 or 6, and it is whole."""
    forward = Toy.forward

    def diverging(self: Toy, row: Tensor, x: Tensor) -> dict[str, Tensor]:
        loss = forward(self, row, x)["loss"]
        if spoilt == "loss" and len(self.seen) == 7:
            loss = loss * float("nan")
        if spoilt == "gradient" and len(self.seen) == 6:  # the loss is a number, the weights after the step are none
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return {"loss": loss}

    monkeypatch.setattr(Toy, "forward", diverging)
    assert programs.run(lambda _: train(tmp_path) and None, []) == 2
    said = capsys.readouterr().err
    last = tmp_path / f"checkpoint-{6 if spoilt == 'loss' else 4}"
    assert (
        f"the training diverged: {'the loss is nan at' if spoilt == 'loss' else 'weights are no longer finite numbers after'} step" in said
    )
    assert f"step {stopped_at}; the last good checkpoint is {last}. Try a smaller learning_rate (now 0.1)" in said
    assert (last / COMPLETE).is_file() and not (tmp_path / "run.json").exists()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*"))[-1] == last.name
    assert all(math.isfinite(loss) and loss for _, loss in losses(tmp_path))


def test_finish_without_processes() -> None:
    finish()
