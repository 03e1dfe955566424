"""Shared by the stage programs: choose what trains, train from the beginning or the last checkpoint to the end, and record it."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainerCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME

from med3dvlm.checkpoints.hub import write_card
from med3dvlm.encoders import count_parameters
from med3dvlm.files import install_model, read_lines, write_json, write_lines
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.processes import connected
from med3dvlm.programs import command_line
from med3dvlm.training.arguments import StageArguments, identity_of
from med3dvlm.training.environment import environment
from med3dvlm.training.nodes import require_same
from med3dvlm.training.trainer import StageTrainer

logger = logging.getLogger(__name__)

LOSSES = {"losses.jsonl": "loss", "validation_losses.jsonl": "eval_loss"}  # file -> the entry of a log that belongs there


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
        raise ValueError(
            "no parameter is left to train; the names begin with: "
            + ", ".join(sorted({n.split(".")[0] for n, _ in model.named_parameters()}))
        )
    return trainable


def lora_targets(model: Med3DVLM) -> str:
    """Return a pattern for every linear layer of the language model but its output head."""
    decoder = model.language_model.get_decoder()
    kinds = sorted({name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)})
    return rf"language_model\..*\.({'|'.join(kinds)})"


class EpochSetter(TrainerCallback):
    """Tells the data set, and then the sampler, which may ask for the lengths of its rows, which epoch it is.

    accelerate's loader (1.15) tells the data set on one process alone, and forgets data set or sampler after a restart inside an epoch.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        batches = train_dataloader.batch_sampler  # of one process, around those of all
        for part in (train_dataloader.dataset, getattr(batches, "batch_sampler", batches).sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(int(state.epoch or 0))


class LossRecorder(TrainerCallback):
    """Appends {"step", "loss", ...} to losses.jsonl at every log, so that the curve is there even when the run was killed.

    Validation losses go to validation_losses.jsonl as {"step", "eval_loss", ...}.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        for name, kind in LOSSES.items():
            if state.is_world_process_zero and logs and kind in logs:
                with (Path(str(args.output_dir)) / name).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def run_training(trainer: StageTrainer, arguments: StageArguments, data_fingerprint: str, **started_from: str) -> None:
    """Train to the end, from the last whole checkpoint where there is one, and write run.json.

    Args:
        started_from: setting that names a model -> fingerprint of its weights.

    Raises:
        ValueError: the output folder holds checkpoints of a training on other data, from other weights or with other settings.
    """
    started = time.perf_counter()
    output = Path(str(arguments.output_dir))
    settings = arguments.to_dict()
    parameters = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    trainer.add_callback(LossRecorder())
    trainer.add_callback(EpochSetter())
    identity = identity_of(arguments, data_fingerprint, started_from)
    if any(isinstance(module, _BatchNorm) and any(one.requires_grad for one in module.parameters()) for module in trainer.model.modules()):
        identity["batch_norm_volumes"] = getattr(arguments, "chunk_size", None) or arguments.train_batch_size
    require_same({"copy the models whole to every node": {"the fingerprint of " + name: value for name, value in started_from.items()}})
    checkpoint = trainer.last_checkpoint(identity)
    steps_before = 0
    if checkpoint is not None:
        logger.warning("continuing from %s", checkpoint)
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        steps_before = state.global_step
        if 0 < arguments.max_steps <= steps_before:
            # The trainer would take one step more; counted in epochs, none is left.
            arguments.max_steps, arguments.num_train_epochs = -1, int(state.epoch)
    if trainer.is_world_process_zero():
        for name in LOSSES:  # of steps after the checkpoint a killed run may have logged some; they come again
            if (output / name).is_file():
                write_lines(output / name, [line for line in read_lines(output / name) if line["step"] <= steps_before])
    with connected(f"start the same command on all nodes again, and it continues from the last checkpoint in {output}"):
        trainer.train(resume_from_checkpoint=checkpoint)
    path, steps = output / "run.json", trainer.state.global_step
    if path.is_file() and steps == steps_before == json.loads(path.read_text(encoding="utf-8-sig")).get("steps"):
        return  # it was finished before, and its record is there
    if trainer.is_world_process_zero():
        record = {
            "command": command_line(),
            "settings": settings,
            "data_fingerprint": data_fingerprint,
            "parameters": parameters,
            "processes": arguments.world_size,
            "steps": steps,
            "seconds": round(time.perf_counter() - started, 1),
            **environment(),
        }
        write_json(path, record)


def save_final(trainer: StageTrainer) -> None:
    """Write model and processor to the output folder, whole or not at all. The weights are in one type, as DeepSpeed leaves them."""
    trainer.require_finite()
    if not trainer.args.deepspeed:
        for parameter in trainer.model.parameters():
            if parameter.is_floating_point():  # quantised ones hold codes
                parameter.data = parameter.data.to(trainer.args.weights_dtype)
    output = Path(str(trainer.args.output_dir))
    aside = output / "saving"
    trainer.save_model(str(aside))
    if not trainer.is_world_process_zero():
        return
    write_card(aside, output)
    install_model(aside, output)


def release(trainer: StageTrainer) -> None:
    """Free the engine's memory before another model is loaded."""
    engine: Any = trainer.model_wrapped
    trainer.accelerator.free_memory()
    if trainer.args.deepspeed:
        engine.destroy()


def finish() -> None:
    """Destroy the process group: otherwise the launcher reports a crash. Models are loaded whole again."""
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
