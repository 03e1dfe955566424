"""A Trainer that survives being killed, and continues under another engine or number of processes.

Its checkpoints hold what was learned (training_state.py), the schedule, and each process's random numbers. The order of rows follows from the seed.
"""

import json
import logging
import math
import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import Trainer, TrainerState, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from med3dvlm.datasets.ahead import OwnRows, fetched_ahead
from med3dvlm.files import MODEL_CONFIGS, share, write_json
from med3dvlm.processes import gathered, together
from med3dvlm.training.arguments import StageArguments
from med3dvlm.training.nodes import COMPLETE, CopyRemover, SharedOutput
from med3dvlm.training.state import TrainingState, write_state
from med3dvlm.training.throughput import Throughput, figures

logger = logging.getLogger(__name__)

IDENTITY = "identity.json"  # the identity of a training: only its own checkpoints are continued
SORTED_TOGETHER = 32  # batches, where rows of like length share one


class DivergedError(ValueError):
    """The loss or the weights of a training are no longer finite."""


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
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, model: nn.Module, args: StageArguments, **options: Any) -> None:
        if not args.deepspeed:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        else:
            set_hf_deepspeed_config(args.hf_deepspeed_config)  # the arguments unset it while models were loaded
        super().__init__(model=model, args=args, **options)
        self.throughput = Throughput()
        self.output = SharedOutput(Path(str(args.output_dir)), args.should_save)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of a step, counted, and the divisor of their loss."""
        return super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log the figures, with the throughput beside those of training steps."""
        if "loss" in logs:
            totals = self.throughput.totals().float().to(self.args.device)
            logs |= figures(self.accelerator.reduce(totals).cpu(), self.args.world_size)
        super().log(logs, *arguments, **options)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay: those of at least two dimensions."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        return self.finite(super().training_step(*arguments, **options))

    def finite(self, loss: Tensor) -> Tensor:
        """Return the loss of a step; raises DivergedError, on all processes, where it is not a finite number."""
        total = self.accelerator.reduce(loss.detach())  # so that all processes stop, not only those whose part is spoilt
        if not torch.isfinite(total):
            self._stop(f"the loss is {total.item()} at step {self.state.global_step + 1}")
        return loss

    def require_finite(self) -> None:
        """Raise DivergedError, on all processes, where a trained weight is not finite."""
        shards = [_own_part(parameter) for parameter in self.model.parameters() if parameter.requires_grad]
        spoilt = torch.stack([~torch.isfinite(shard).all() for shard in shards]).any()
        if self.accelerator.reduce(spoilt.to(self.args.device, torch.float32)) > 0:
            self._stop(f"weights are no longer finite numbers after step {self.state.global_step}")

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compute, log and return the loss over the validation split, which does not depend on how its rows are batched and shared out."""
        with self.throughput.paused():
            metrics = self._evaluated(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluated(self, prefix: str) -> dict[str, float]:
        training = self.model.training
        self.model.eval()
        if torch.distributed.is_initialized():
            for buffer in self.model.buffers():  # the running statistics that are saved are those of the first process
                torch.distributed.broadcast(buffer, 0)
        with torch.no_grad():
            metrics = {f"{prefix}_loss": self.validation_loss()}
        self.model.train(training)
        return metrics

    def validation_loss(self) -> float:
        """Return the loss over all rows of `eval_dataset`."""
        raise NotImplementedError

    def validation_batches(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Yield this process's share of the validation rows as batches on its device, each with the numbers of its rows.

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
            "smaller max_grad_norm, into another --output-dir"
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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        parts = self.args.world_size * self.args.gradient_accumulation_steps
        batch = parts * self.args.train_batch_size
        if len(rows) < batch:
            effect = "rows are repeated to fill it" if parts > 1 else "it is made that small"
            logger.warning("a batch takes %d rows, but there are only %d: %s", batch, len(rows), effect)
            batch = len(rows) if parts == 1 else batch
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        strategy = self.args.train_sampling_strategy
        lengths = rows.lengths if strategy == "group_by_length" else None
        sampler = WholeBatches(len(rows), batch, None if strategy == "sequential" else seed, self.args.dataloader_drop_last, lengths)
        own = OwnRows(self.args.train_batch_size, self.args.world_size, self.args.process_index)
        return fetched_ahead(sampler, rows, own, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:  # a checkpoint holds the training's state, not a model
            super().save_model(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write_state(Path(output_dir), self.model, self._stepping_optimizer, self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        TrainingState(resume_from_checkpoint).set_weights(self.model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)  # before an engine makes its copies
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            TrainingState(resume_from_checkpoint).set_optimizer(self.model, self._stepping_optimizer)
            self._continue_schedule(Path(resume_from_checkpoint), max_steps)
        return prepared

    def _continue_schedule(self, checkpoint: Path, max_steps: int) -> None:
        """Continue the learning rate, and log where it differs from before because the training now takes more or fewer steps."""
        schedule = self.lr_scheduler
        schedule.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        before = rates = schedule.get_last_lr()
        if isinstance(schedule, LambdaLR) and schedule.last_epoch < max_steps:  # as long as the training is now
            rates = [rate * shape(schedule.last_epoch) for rate, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = rates  # the logged value
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if not math.isclose(before[0], rates[0], rel_tol=1e-6, abs_tol=1e-12):
            planned = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).max_steps
            logger.warning(
                "the training was begun for %d steps and now takes %d: at step %d the learning rate goes from %g to %g, as the schedule of "
                "%d steps has it there; a training of that length from the start would have had other rates until here",
                planned, max_steps, schedule.last_epoch, before[0], rates[0], max_steps,
            )  # fmt: skip

    @property
    def _stepping_optimizer(self) -> Any:
        """Return torch's optimiser, or the engine's around it."""
        engine: Any = self.model_wrapped
        return engine.optimizer if self.args.deepspeed else self.optimizer.optimizer

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.output.brought(Path(str(self.state.best_model_checkpoint)).name)))
        gathered(None)
        self.output.drop_copies()

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random numbers of all processes beside each other: those of another node would else lie on its own disk."""
        with TemporaryDirectory() as aside:
            super()._save_rng_state(aside)
            states = gathered({path.name: path.read_bytes() for path in Path(aside).iterdir()})
        if self.args.should_save:
            for name, state in ChainMap(*states).items():
                (Path(output_dir) / name).write_bytes(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if (Path(str(checkpoint)) / name).is_file():
            super()._load_rng_state(checkpoint)
        else:  # it was written by another number of processes
            set_seed(self.args.seed + self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            self._save_whole_checkpoint(model, trial)

    def _save_whole_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(model, trial)
        self.state.best_model_checkpoint = gathered(self.state.best_model_checkpoint)[0]  # others may not see it
        if self.args.should_save:
            checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            share(checkpoint)
            (checkpoint / COMPLETE).touch()

    def _require_same(self, root: Path, identity: dict[str, Any]) -> None:
        path = root / IDENTITY
        if not path.is_file():
            raise ValueError(
                f"{root} holds a model or checkpoints without {IDENTITY}, so their training is unknown; move them or choose another --output-dir"
            )
        before = json.loads(path.read_text(encoding="utf-8-sig"))
        different = [name for name, value in identity.items() if before.get(name, value) != value]
        if not different:
            return
        values = (" and ".join(str(settings[name]) for name in different) for settings in (before, identity))
        notes = ""
        if "batch_size" in different:
            each, processes, parts = self.args.train_batch_size, self.args.world_size, self.args.gradient_accumulation_steps
            notes = f"; batch_size is per_device_train_batch_size {each} x {processes} processes x gradient_accumulation_steps {parts}"
            if before["batch_size"] % (processes * parts) == 0:
                notes += f", and --per-device-train-batch-size {before['batch_size'] // (processes * parts)} makes it what it was"
        if "batch_norm_volumes" in different:
            notes += "; batch norm sees the volumes of one process (per_device_train_batch_size), so that it would learn something else"
        raise ValueError(
            f"{root} holds a training with another {' and '.join(different)}: {' then, '.join(values)} now; start it as it was begun, delete it "
            f"or choose another --output-dir{notes}"
        )

    def last_checkpoint(self, identity: dict[str, Any]) -> str | None:
        """Return the newest whole checkpoint of the training of this identity and delete incomplete ones; None begins the training.

        Raises:
            ValueError: the checkpoints are those of another training.
        """
        together(self._begin, identity)
        newest = self.output.newest()
        self.add_callback(CopyRemover(self.output))
        return None if newest is None else str(newest)

    def _begin(self, identity: dict[str, Any]) -> None:
        root, folders = self.output.root, self.output.checkpoints()
        if folders or any((root / name).is_file() for name in MODEL_CONFIGS):  # a model that the training would replace
            self._require_same(root, identity)
        if not folders and self.args.should_save:
            (root / "run.json").unlink(missing_ok=True)  # it is about a training whose checkpoints are gone
            write_json(root / IDENTITY, identity)
        self.output.clean()


class WholeBatches(Sampler[int]):
    """Row numbers of an epoch. The first rows are repeated to fill the last batch, so that any number of processes sees the same.

    Args:
        batch_size: over all processes and parts of an accumulated batch.
        seed: of the order, which is another in every epoch; None keeps the rows' own.
        drop_last: leave the last batch out where it is not whole.
        lengths: gives about how long each row of this epoch is. With it, rows of like length share a batch, so that little of it is padding: the
            rows of SORTED_TOGETHER batches of the random order are sorted, and all batches shuffled. It is asked when the epoch begins.

    Raises:
        ValueError: no batch would be left.
    """

    epoch = 0

    def __init__(
        self, rows: int, batch_size: int, seed: int | None, drop_last: bool = False, lengths: Callable[[], Sequence[int]] | None = None
    ) -> None:
        self.rows, self.batch_size, self.seed, self.lengths = rows, batch_size, seed, lengths
        self.length = (rows // batch_size if drop_last else -(-rows // batch_size)) * batch_size
        if self.length == 0:
            raise ValueError(
                f"a batch takes {batch_size} rows but there are {rows}, so dataloader_drop_last leaves no batch; pass smaller ones"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return islice(cycle(range(self.rows)), self.length)
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        order = list(islice(cycle(torch.randperm(self.rows, generator=random).tolist()), self.length))
        if self.lengths is None:
            return iter(order)
        lengths, chunk = self.lengths(), SORTED_TOGETHER * self.batch_size
        order = [row for first in range(0, len(order), chunk) for row in sorted(order[first : first + chunk], key=lengths.__getitem__)]
        batches = torch.randperm(len(order) // self.batch_size, generator=random).tolist()
        return iter([row for batch in batches for row in order[batch * self.batch_size : (batch + 1) * self.batch_size]])

    def __len__(self) -> int:
        return self.length


def _own_part(parameter: Any) -> Tensor:
    """Return the parameter, or under ZeRO-3 this process's part of it, without its padding."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    part, rank = parameter.ds_tensor, torch.distributed.get_rank()
    return part.flatten()[: max(0, parameter.ds_numel - rank * part.numel())]
