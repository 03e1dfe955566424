"""python tests/drivers/killed_training.py STAGE FOLDER FLAGS...: trains uninterrupted into FOLDER/whole, and killed six times into FOLDER/killed.

Every attempt is a separate process that ends by SIGKILL, as the kernel ends one that takes too much memory. They are
forked from a program that has imported everything, which saves the imports. Writes their exit codes to FOLDER/codes.json.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch._dynamo  # noqa: F401  before the forks, so that it is imported once

from med3dvlm import programs
from med3dvlm.training.run import LossRecorder
from med3dvlm.training.trainer import StageTrainer

Kill = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(step: int) -> Kill:
    """Kill the process when the loss of the step is on disk but its checkpoint is not."""

    def install() -> None:
        log = LossRecorder.on_log

        def on_log(self: LossRecorder, args: Any, state: Any, *rest: Any, **more: Any) -> None:
            log(self, args, state, *rest, **more)
            if state.global_step == step:
                die()

        LossRecorder.on_log = on_log  # type: ignore[method-assign]

    return install


def while_writing(step: int, method: str, before: bool) -> Kill:
    """Kill the process before or after the trainer writes this part of the checkpoint of this step."""

    def install() -> None:
        write = getattr(StageTrainer.__mro__[1], method)

        def killed(self: StageTrainer, *arguments: Any) -> None:
            if before and self.state.global_step == step:
                die()
            write(self, *arguments)
            if self.state.global_step == step:
                die()

        setattr(StageTrainer.__mro__[1], method, killed)

    return install


def while_writing_the_model() -> None:
    write = StageTrainer.save_model

    def save_model(self: StageTrainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        write(self, output_dir, _internal_call)
        if Path(str(output_dir)).name == "saving":
            die()

    StageTrainer.save_model = save_model  # type: ignore[method-assign]


# Of eight steps, six an epoch, with a checkpoint every third: before the first, inside an epoch, in the second epoch, at the end.
KILLS: tuple[Kill, ...] = (
    after_step(2),
    while_writing(3, "_save_rng_state", before=True),
    after_step(4),
    while_writing(6, "_save_checkpoint", before=False),  # whole, but not yet marked so
    after_step(7),
    while_writing_the_model,
)


def attempt(stage: ModuleType, output: Path, flags: list[str], kill: Kill | None) -> int:
    """Return the exit code of a training in a separate process, negative for a signal."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        if kill is not None:
            kill()
        words = [*flags, "--output-dir", str(output), "--merged", str(output / "merged")]
        os._exit(programs.run(stage.main, words, stage.__name__))
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    stage, folder, flags = importlib.import_module(f"med3dvlm.training.{sys.argv[1]}"), Path(sys.argv[2]), sys.argv[3:]
    codes = [attempt(stage, folder / "whole", flags, None)]
    codes += [attempt(stage, folder / "killed", flags, kill) for kill in (*KILLS, None)]
    (folder / "codes.json").write_text(json.dumps(codes))
