"""Which parameters train, and trainings that are interrupted, repeated or changed, on the toy model."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import med3dvlm.training.arguments
import med3dvlm.training.environment
from med3dvlm import Med3DCLIP, Med3DVLM, programs
from med3dvlm.training.environment import environment
from med3dvlm.training.run import (
    finish,
    lora_targets,
    train_only,
)
from med3dvlm.training.trainer import COMPLETE, IDENTITY, StageTrainer, WholeBatches
from tests.training.toy import Rows, Toy, losses, toy_arguments, train


def test_train_only_freezes_by_name() -> None:
    model = nn.ModuleDict({"eye": nn.Linear(2, 2), "mouth": nn.Linear(2, 2)})
    model["eye"].requires_grad_(False)
    assert train_only(model, lambda name: name.startswith("eye.")) == ["eye.weight", "eye.bias"]
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    with pytest.raises(ValueError, match="no parameter is left to train; the names begin with: eye, mouth"):
        train_only(model, lambda name: name.startswith("nose."))


def test_lora_goes_to_every_linear_layer_of_the_language_model(tiny_models: Any) -> None:
    """The expected layers are found by their type instead of their name."""
    import re

    model = Med3DVLM.from_pretrained(tiny_models.vlm)
    pattern = re.compile(lora_targets(model))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linear if name.startswith("language_model.") and "lm_head" not in name}
    assert {name for name, _ in model.named_modules() if pattern.fullmatch(name)} == expected
    assert len(expected) == 7 * model.config.text_config.num_hidden_layers


def test_one_process_uses_the_first_of_several_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The Trainer would wrap the model in DataParallel, with which these models do not work."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 4))  # on the CPU transformers counts none
    arguments = toy_arguments(tmp_path)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.per_device_train_batch_size
    assert "4 GPUs are visible" in caplog.text and "start the stage with `deepspeed` or `torchrun`" in caplog.text


def test_weight_decay_leaves_out_tensors_of_fewer_than_two_dimensions(tiny_models: Any, tmp_path: Path) -> None:
    """This is open_clip's rule; transformers' own rule goes by names and would let the three parameters at the end decay."""
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


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_training_interrupted_within_an_epoch_resumes_exactly(strategy: str, tmp_path: Path) -> None:
    """Rows, dropout, losses and weights are equal bit for bit after a restart from checkpoint 6, the second step of the second epoch."""
    whole = train(tmp_path / "whole", train_sampling_strategy=strategy)
    if strategy == "group_by_length":  # by this epoch's lengths no batch overlaps another
        for epoch in (0, 1):
            rows = Rows()
            rows.set_epoch(epoch)
            lengths = sorted(sorted(rows.lengths()[index] for _, index in batch) for batch in whole.seen[4 * epoch : 4 * epoch + 4])
            assert all(one[-1] <= other[0] for one, other in pairwise(lengths))
    assert [rows[0][0] for rows in whole.seen] == [0] * 4 + [1] * 4 + [2] * 2
    first, second = ([index for rows in whole.seen[step : step + 4] for _, index in rows] for step in (0, 4))
    assert set(first) == set(second) == set(range(13)) and len(first) == len(second) == 16 and first != second

    train(tmp_path / "stopped", stop_after=7, train_sampling_strategy=strategy)
    assert [step for step, _ in losses(tmp_path / "stopped")] == list(range(1, 7))
    again = train(tmp_path / "stopped", train_sampling_strategy=strategy)
    assert again.seen == whole.seen[6:]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert torch.equal(again.linear.weight, whole.linear.weight)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_training_on_two_processes_resumes_exactly(strategy: str, tmp_path: Path, shell: Callable[..., str], free_port: str) -> None:
    shell("python", "tests/drivers/two_processes.py", tmp_path, free_port, strategy)
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


@pytest.mark.parametrize("incomplete", [[], ["checkpoint-6"], ["checkpoint-4", "checkpoint-6"]])
def test_incomplete_checkpoints_are_not_used(incomplete: list[str], tmp_path: Path) -> None:
    train(tmp_path, stop_after=7, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    for name in incomplete:
        (tmp_path / name / COMPLETE).unlink()
    model = train(tmp_path, save_total_limit=2)
    assert len(model.seen) == {0: 4, 1: 6, 2: 10}[len(incomplete)]
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 11))


def test_a_finished_training_started_again_does_nothing(tmp_path: Path) -> None:
    """Ten steps are two and a half epochs: transformers' Trainer would take an eleventh step."""
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
    """Nothing in the folder changes, neither a complete checkpoint nor an incomplete one."""
    train(tmp_path, max_steps=4)
    (tmp_path / "checkpoint-4" / COMPLETE).unlink()
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(ValueError, match=f"holds a training with another {named}: .* then, .* now; start it as it was begun, delete it or"):
        train(tmp_path, **{"max_steps": 4, **change})
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_settings_that_do_not_change_the_result_may_change(tmp_path: Path) -> None:
    """The output folder, the interval of checkpoints, the number of steps and gradient accumulation may differ when training resumes."""
    train(tmp_path / "one", stop_after=3)
    (tmp_path / "one").rename(tmp_path / "two")
    changes = {"save_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "cache_features": True}
    train(tmp_path / "two", max_steps=5, **changes)
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 2, 3, 4, 5]


def test_checkpoints_of_unknown_origin_are_neither_used_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-8").mkdir()
    (tmp_path / "checkpoint-8" / "model.safetensors").write_text("precious")
    with pytest.raises(ValueError, match=f"holds a model or checkpoints without {IDENTITY}"):
        train(tmp_path)
    assert (tmp_path / "checkpoint-8" / "model.safetensors").read_text() == "precious"
    (tmp_path / "checkpoint-8").rename(tmp_path / "checkpoint-best")  # no name of the trainer's
    assert len(train(tmp_path, max_steps=2).seen) == 2 and (tmp_path / "checkpoint-best").is_dir()


def test_settings_may_change_before_the_first_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, stop_after=1)
    (tmp_path / "run.json").write_text("{}")  # of a training whose checkpoints were deleted
    train(tmp_path, stop_after=1, learning_rate=0.2)
    assert json.loads((tmp_path / IDENTITY).read_text())["learning_rate"] == 0.2 and not (tmp_path / "run.json").exists()


def test_run_json_records_the_training(tmp_path: Path, repository: Path) -> None:
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


def test_the_commit_of_a_surrounding_repository_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "venv" / "site-packages" / "med3dvlm"
    package.mkdir(parents=True)
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(med3dvlm.training.environment, "__file__", str(package / "training.py"))
    assert environment()["commit"] is None


def test_a_changed_schedule_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cosine over 4 steps ends at 0 after them; a cosine over 8 steps is then at half of the learning rate."""
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
    with pytest.raises(ValueError, match="dataloader_drop_last leaves no batch"):
        WholeBatches(3, 4, None, True)


@pytest.mark.parametrize("batch", [4, 12])
def test_rows_of_like_length_share_batches(batch: int) -> None:
    lengths = np.random.default_rng(0).integers(50, 400, 1000).tolist()
    plain, grouped = WholeBatches(1000, batch, 3), WholeBatches(1000, batch, 3, lengths=lambda: lengths)
    seen = []
    for epoch in (0, 1, 0):
        for order in (plain, grouped):
            order.set_epoch(epoch)
        one, other = list(plain), list(grouped)
        assert sorted(one) == sorted(other) and len(other) == len(grouped)  # the same rows, in another order
        padded = [
            sum(batch * max(lengths[row] for row in rows[first : first + batch]) for first in range(0, len(rows), batch))
            for rows in (one, other)
        ]
        needed = sum(lengths[row] for row in one)
        assert padded[1] - needed < 0.2 * (padded[0] - needed)
        means = np.array([lengths[row] for row in other]).reshape(-1, batch).mean(axis=1)
        assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3  # short batches come anywhere
        seen.append(other)
    assert seen[0] == seen[2] != seen[1]


def test_the_record_needs_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


@pytest.mark.parametrize(("spoilt", "stopped_at"), [("loss", 7), ("gradient", 6)])
def test_a_training_that_diverges_stops_before_it_is_saved(
    spoilt: str, stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are written every second step; the last good one, of step 4 or 6, is complete."""
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
