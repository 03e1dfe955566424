"""What the stage scripts share: what trains, a trainer that survives being killed, and the record of a run."""

import json
import logging
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from med3dvlm.allocator import keep_freed_memory
from med3dvlm.arguments import StageArguments, identity_of
from med3dvlm.encoders import count_parameters
from med3dvlm.files import install_model, read_lines, write_json, write_lines
from med3dvlm.vlm import Med3DVLM

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # the file that says a checkpoint was written to its end
IDENTITY = "identity.json"  # what a training was begun with: only its own checkpoints are continued
LOSSES = {"losses.jsonl": "loss", "validation_losses.jsonl": "eval_loss"}  # file -> the entry of a log that belongs there
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "open_clip_torch", "monai", "numpy")


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
    """A pattern for every linear layer of the language model but its output head."""
    decoder = model.language_model.get_decoder()
    kinds = sorted({name.rsplit(".", 1)[-1] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)})
    return rf"language_model\..*\.({'|'.join(kinds)})"


class DivergedError(ValueError):
    """The loss or the weights of a training are no longer numbers."""


class StageTrainer(Trainer):
    """A Trainer whose checkpoints count only when they are whole, and which continues from the last whole one.

    - Volumes reach the device as they are stored; there they become the model's float32 and, where rows have keys, are augmented.
    - Weights that train are float32, whatever the others are. DeepSpeed casts them and keeps float32 copies that it updates.
    - Tensors of fewer than two dimensions (biases, gains of norms, layer scales, the temperature) do not decay, as in open_clip. The released
      script leaves the choice to transformers, which goes by names and lets gains inside nn.Sequential, layer scales and the temperature decay.
    - A loss or a weight that is not a finite number ends the training before it is saved, so that the last good checkpoint stays.
    """

    model: Any
    args: StageArguments

    def __init__(self, model: nn.Module, args: StageArguments, **options: Any) -> None:
        if not args.deepspeed:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        else:
            set_hf_deepspeed_config(args.hf_deepspeed_config)  # which the arguments took back while models were being loaded
        super().__init__(model=model, args=args, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: those of at least two dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        total = self.accelerator.reduce(loss.detach())  # so that all processes stop, not only those whose part is spoilt
        if not torch.isfinite(total):
            self._stop(f"the loss is {total.item()} at step {self.state.global_step + 1}")
        return loss

    def require_finite(self) -> None:
        """Raise DivergedError, on all processes, where a weight that trains is not a finite number."""
        shards = [_own_part(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        spoilt = torch.stack([~torch.isfinite(shard).all() for shard in shards]).any()
        if self.accelerator.reduce(spoilt.to(self.args.device, torch.float32)) > 0:
            self._stop(f"weights are no longer finite numbers after step {self.state.global_step}")

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compute, log and return the loss over the validation split, which does not depend on how its rows are batched and shared out."""
        training = self.model.training
        self.model.eval()
        if torch.distributed.is_initialized():
            for buffer in self.model.buffers():  # the running statistics that are saved are those of the first process
                torch.distributed.broadcast(buffer, 0)
        with torch.no_grad():
            metrics = {f"{metric_key_prefix}_loss": self.validation_loss()}
        self.model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def validation_loss(self) -> float:
        """The loss over all rows of `eval_dataset`."""
        raise NotImplementedError

    def validation_batches(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """This process's share of the validation rows as batches on its device, each with the numbers of its rows.

        All processes get equally many batches, since under ZeRO-3 they compute together; a row that only fills up has the number -1.
        """
        rows: Any = self.eval_dataset
        rank, processes = self.args.process_index, self.args.world_size
        numbers = [number if number < len(rows) else -1 for number in range(rank, -(-len(rows) // processes) * processes, processes)]
        size = self.args.per_device_eval_batch_size
        loader = DataLoader(
            Subset(rows, [max(number, 0) for number in numbers]), size, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )  # fmt: skip
        for start, batch in zip(range(0, len(numbers), size), loader, strict=True):
            yield self._prepare_inputs(batch), numbers[start : start + size]

    def _stop(self, what: str) -> None:
        checkpoint = get_last_checkpoint(str(self.args.output_dir))
        kept = f"; the last good checkpoint is {checkpoint}" if checkpoint else ""
        raise DivergedError(
            f"the training diverged: {what}{kept}. Try a smaller learning_rate (now {self.args.learning_rate:g}), a longer warm-up or a "
            "smaller max_grad_norm, into another --output_dir"
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._prepare_inputs(inputs)
        keys = batch.pop("augmentation_keys", None)
        if "pixel_values" in batch:
            dataset: Any = self.train_dataset
            grid = dataset.data.processor.grid
            volumes = grid.dequantize(batch["pixel_values"])
            if keys is not None:
                volumes = dataset.augmentation(volumes, keys, grid.values)
            batch["pixel_values"] = self._prepare_input(volumes)  # in the type of numbers that DeepSpeed computes with
        return batch

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)
        if self.args.parallel_mode.value == "distributed":
            torch.distributed.barrier()
        if self.args.should_save:
            (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()

    def last_checkpoint(self, identity: dict[str, Any]) -> str | None:
        """The newest whole checkpoint of the training of this identity; parts of others are deleted. Where there is none, it is begun.

        Raises:
            ValueError: the checkpoints are those of another training.
        """
        root = Path(str(self.args.output_dir))
        with self.args.main_process_first(local=False):
            folders = [folder for folder in root.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]
            if folders:
                _same_training(root, identity)
            elif self.args.should_save:
                (root / "run.json").unlink(missing_ok=True)  # it is about a training whose checkpoints are gone
                write_json(root / IDENTITY, identity)
            for folder in folders:
                if not (folder / COMPLETE).is_file() and self.args.should_save:
                    logger.warning("deleting %s, which was not written to its end", folder)
                    shutil.rmtree(folder)
        return get_last_checkpoint(str(root))


def _own_part(parameter: Any) -> Tensor:
    """The parameter, or under ZeRO-3 this process's part of it, without what fills the last part up and is never written."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part, rank = parameter.ds_tensor, torch.distributed.get_rank()
    return part.flatten()[: max(0, parameter.ds_numel - rank * part.numel())]


def whole(*parameters: nn.Parameter) -> AbstractContextManager[None]:
    """Within it parameters are there whole, outside of a model's forward, too; ZeRO-3 else leaves each process a shard."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero

    gathered: AbstractContextManager[None] = zero.GatheredParameters(list(parameters))
    return gathered


class EpochSetter(TrainerCallback):
    """Tells data set and sampler which epoch it is.

    accelerate's loader (1.15) tells the data set on one process alone, and forgets data set or sampler after a restart inside an epoch.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        for part in (train_dataloader.dataset, train_dataloader.get_sampler()):
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


def _same_training(root: Path, identity: dict[str, Any]) -> None:
    path = root / IDENTITY
    if not path.is_file():
        raise ValueError(f"{root} holds checkpoints but no {IDENTITY} that says of what training; move them or choose another --output_dir")
    before = json.loads(path.read_text(encoding="utf-8-sig"))
    different = [name for name, value in identity.items() if before.get(name, value) != value]
    if different:
        values = (" and ".join(str(settings[name]) for name in different) for settings in (before, identity))
        raise ValueError(
            f"{root} holds a training with another {' and '.join(different)}: {' then, '.join(values)} now; start it as it was begun, delete it "
            "or choose another --output_dir"
        )


def run_training(trainer: StageTrainer, arguments: StageArguments, data_fingerprint: str, **started_from: str) -> None:
    """Train to the end, from the last whole checkpoint where there is one, and write run.json.

    Args:
        started_from: setting that names a model -> fingerprint of its weights.

    Raises:
        ValueError: the output folder holds checkpoints of a training on other data, from other weights or with other settings.
    """
    started = time.perf_counter()
    output = Path(str(arguments.output_dir))
    output.mkdir(parents=True, exist_ok=True)
    settings = arguments.to_dict()
    parameters = count_parameters(trainer.accelerator.unwrap_model(trainer.model))
    trainer.add_callback(LossRecorder())
    trainer.add_callback(EpochSetter())
    checkpoint = trainer.last_checkpoint(identity_of(arguments, data_fingerprint, started_from))
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
    trainer.train(resume_from_checkpoint=checkpoint)
    path, steps = output / "run.json", trainer.state.global_step
    if path.is_file() and steps == steps_before == json.loads(path.read_text(encoding="utf-8-sig")).get("steps"):
        return  # it was finished before, and its record is there
    if trainer.is_world_process_zero():
        record = {
            "command": " ".join(sys.argv),
            "settings": settings,
            "data_fingerprint": data_fingerprint,
            "parameters": parameters,
            "processes": arguments.world_size,
            "steps": steps,
            "seconds": round(time.perf_counter() - started, 1),
            **environment(),
        }
        write_json(path, record)


def save_final(trainer: StageTrainer, *processors: Any) -> None:
    """Write model and processors to the output folder, whole or not at all. The weights are in one type, as DeepSpeed leaves them."""
    trainer.require_finite()
    if not trainer.args.deepspeed:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(trainer.args.weights_dtype)
    output = Path(str(trainer.args.output_dir))
    aside = output / "saving"
    trainer.save_model(str(aside))
    if not trainer.is_world_process_zero():
        return
    for processor in processors:
        processor.save_pretrained(aside)
    install_model(aside, output)


def environment() -> dict[str, Any]:
    """Versions and commit, for the record of a run or an evaluation."""
    commit = None
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or None
    return {"versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}, "commit": commit}


def release(trainer: StageTrainer) -> None:
    """Let the engine's memory go before another model is loaded."""
    engine: Any = trainer.model_wrapped
    trainer.accelerator.free_memory()
    if trainer.args.deepspeed:
        engine.destroy()


def finish() -> None:
    """Take the process group down: without that the launcher reports a crash. Models are loaded whole again."""
    unset_hf_deepspeed_config()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def launch(main: Callable[[], None]) -> None:
    """Run a stage's `main`. What the user can mend, a file or a setting, ends it with one sentence; a defect with its traceback."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    try:
        main()
    except (OSError, SafetensorError, ValueError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, ValueError) and Path(__file__).parent not in raised_in.parents:
            raise  # a library's: it needs its traceback
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; started again, it continues from its last checkpoint\n")
        raise SystemExit(130) from None
