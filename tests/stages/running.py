"""The result of a stage that was run in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass
class Run:
    """The model's parameters and buffers before and after, names of trainable parameters, and the output of a stage."""

    output: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    parameters: set[str]
    trainable: set[str]

    @property
    def changed(self) -> set[str]:
        return {name for name, value in self.before.items() if not torch.equal(value, self.after[name])}

    @property
    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.output / "losses.jsonl").read_text().splitlines()]

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.output / "run.json").read_text())


def name_of(stage: ModuleType) -> str:
    return stage.__name__.rpartition(".")[2]
