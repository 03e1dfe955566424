"""A model of four weights with its data and arguments, whose every training step can be followed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from med3dvlm.training.arguments import StageArguments
from med3dvlm.training.run import (
    run_training,
)
from med3dvlm.training.trainer import StageTrainer


@dataclass
class ToyArguments(StageArguments):
    knows_lengths = True
    colour: str = field(default="red", metadata={"help": "of the toy, 100 % sure"})
    speed: float | None = None


def toy_arguments(folder: Path, **settings: Any) -> ToyArguments:
    fixed = {"use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "data": "x"}
    return ToyArguments(str(folder), **fixed | settings)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """13 rows, each with its number and the epoch that it was drawn for."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 13

    def lengths(self) -> list[int]:
        return [(7 * index + 3 * self.epoch) % 13 for index in range(13)]

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
    """Stops after the step without a checkpoint, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(folder: Path, stop_after: int | None = None, data: str = "f1", weights: str = "w1", **settings: Any) -> Toy:
    """Train ten steps of four rows in epochs of four steps, with a checkpoint every second step and a constant learning rate."""
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
