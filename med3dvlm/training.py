"""What the stage scripts share: arguments from YAML and command line, what trains, a trainer that survives being killed, and the record of a run."""

import json
import logging
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from med3dvlm.encoders import count_parameters

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # the file that says a checkpoint was written to its end
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch", "monai", "numpy")


@dataclass
class StageArguments(TrainingArguments):
    """transformers' TrainingArguments and what every stage needs besides. Every field is a key of the YAML and a flag."""

    data: str = field(default="", metadata={"help": "prepared data, see `med3dvlm prepare`"})
    exclude_failures: bool = field(default=False, metadata={"help": "train without the studies that could not be prepared"})
    cache_features: bool = field(default=False, metadata={"help": "compute a frozen tower's output once a study and keep it in <data>/features"})


Arguments = TypeVar("Arguments", bound=StageArguments)


def parse_arguments(kind: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Arguments of a stage: defaults, then the YAML named by --config, then the command line.

    Ends the program with one sentence when a key is unknown or a value does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(kind)
    known = {name.name for name in fields(kind) if name.init}
    if "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            parser.error("--config needs the path of a YAML file")
        path = Path(argv[place + 1])
        del argv[place : place + 2]
        if not path.is_file():
            parser.error(f"{path} is missing; the recipes are in stages/configs")
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        unknown = sorted(set(settings) - known)
        if unknown:
            parser.error(f"{path} has the unknown keys {', '.join(unknown)}; {_nearest(unknown[0], known)}")
        parser.set_defaults(**settings)
        for action in parser._actions:  # a value from the file counts as given
            if action.dest in settings:
                action.required = False
    namespace, rest = parser.parse_known_args(argv)
    flags = [flag.split("=")[0].lstrip("-") for flag in rest if flag.startswith("--")]
    if rest:
        parser.error(f"unknown: {' '.join(rest)}; {_nearest(flags[0], known) if flags else 'every setting is --name value'}")
    values = {key: value for key, value in vars(namespace).items() if key in known}
    if not values["data"]:
        parser.error("--data is missing; make it with `med3dvlm prepare`")
    try:
        return kind(**values)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _nearest(name: str, known: set[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for the known ones"


def train_only(model: nn.Module, chosen: Callable[[str], bool]) -> list[str]:
    """Freeze every parameter but those whose name is chosen; returns their names.

    Raises:
        ValueError: nothing is chosen.
    """
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
        if parameter.requires_grad:
            trainable.append(name)
    if not trainable:
        raise ValueError("no parameter is left to train; the names begin with: " + ", ".join(sorted({n.split(".")[0] for n, _ in model.named_parameters()})))
    return trainable


class StageTrainer(Trainer):
    """A Trainer whose checkpoints count only when they are whole, and which continues from the last whole one."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.parallel_mode.value == "distributed":
            torch.distributed.barrier()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint; parts of others are deleted."""
        root = Path(self.args.output_dir)
        with self.args.main_process_first(local=False):
            for folder in root.glob("checkpoint-*"):
                if not (folder / COMPLETE).is_file() and self.args.should_save:
                    logger.warning("deleting %s, which was not written to its end", folder)
                    shutil.rmtree(folder)
        return get_last_checkpoint(str(root)) if root.is_dir() else None


class LossRecorder(TrainerCallback):
    """Appends {"step", "loss", ...} to losses.jsonl at every log, so that the curve is there even when the run was killed."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            with (Path(args.output_dir) / "losses.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def run_training(trainer: StageTrainer, arguments: StageArguments, fingerprint: str) -> None:
    """Train to the end, from the last whole checkpoint where there is one, and write run.json beside what `save` will write."""
    started = time.perf_counter()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    trainer.add_callback(LossRecorder())
    checkpoint = trainer.last_checkpoint()
    if checkpoint is None:
        (output / "losses.jsonl").unlink(missing_ok=True)
    else:
        logger.warning("continuing from %s", checkpoint)
    parameters = count_parameters(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        record = {
            "command": " ".join(sys.argv),
            "settings": arguments.to_dict(),
            "data_fingerprint": fingerprint,
            "parameters": parameters,
            "processes": arguments.world_size,
            "steps": trainer.state.global_step,
            "seconds": round(time.perf_counter() - started, 1),
            **environment(),
        }
        (output / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions and commit, for the record of a run or an evaluation."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": git.stdout.strip() or None,
    }


def finish() -> None:
    """Take the process group down: without that the launcher reports a crash."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
