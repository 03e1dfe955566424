"""The settings of a training, and which of them identify it. `parsing` reads them from a YAML and the command line."""

import json
import logging
import os
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.logging import disable_progress_bar

from med3dvlm.allocator import keep_freed_memory
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.store import PreparedData
from med3dvlm.processes import together
from med3dvlm.remote.cache import LIMIT as CACHE_LIMIT
from med3dvlm.remote.cache import SIZE as CACHE_SIZE
from med3dvlm.remote.cache import Cache
from med3dvlm.training.limits import check_settings
from med3dvlm.training.nodes import require_same_start

logger = logging.getLogger(__name__)

# transformers' settings that shape what is learned. Of a stage's own all do, but for those in FREE.
LEARNING = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy",
)  # fmt: skip
# Settings of output, measurement and speed, which do not change what is learned; the split file is in the fingerprint of the data.
FREE = {
    "merged", "save_language_model", "chunk_size", "cache_features", "exclude_failures", "validation_split", "split_file", "data_cache",
    "data_cache_size",
}  # fmt: skip
ZERO_STAGES = (1, 2, 3)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@dataclass
class StageArguments(TrainingArguments):
    """transformers' TrainingArguments and the settings of every stage. Every field is a key of the YAML and a flag."""

    knows_lengths = False  # whether the stage's rows say how long they are, for train_sampling_strategy

    remove_unused_columns: bool = field(default=False, metadata={"help": "the collators take what they need from a row"})
    data: str = field(default="", metadata={"help": "prepared data, see `med3dvlm prepare`: a folder, or an address as s3://bucket/data"})
    data_cache: str = field(
        default="", metadata={"help": "folder on this machine, shared by its processes, for volumes of data at an address"}
    )
    data_cache_size: str = field(default=CACHE_SIZE, metadata={"help": CACHE_LIMIT})
    exclude_failures: bool = field(default=False, metadata={"help": "train without the studies that could not be prepared"})
    split_file: str = field(default="", metadata={"help": "JSON of the studies of each split, as `med3dvlm audit` writes it"})
    validation_split: str = field(
        default="validation", metadata={"help": "split whose loss is computed every --eval-steps steps, with --eval-strategy steps"}
    )
    cache_features: bool = field(
        default=False, metadata={"help": "compute a frozen tower's output once a study and keep it in <data>/features"}
    )

    def __post_init__(self) -> None:
        check_settings(vars(self))
        if self.train_sampling_strategy == "group_by_length" and not self.knows_lengths:
            raise ValueError(
                "train_sampling_strategy is 'group_by_length', but this stage does not know how long its rows are; take random or sequential"
            )
        Cache(self.data_cache, self.data_cache_size)
        if self.bf16 and not self.use_cpu and not _gpu_has_bfloat16():
            raise ValueError(
                "bf16 is true but there is no GPU here that computes in bfloat16; pass --use-cpu true to train on the CPU, or --bf16 false"
            )
        if isinstance(self.deepspeed, str) and self.deepspeed:
            path = find_config(self.deepspeed, ".json")
            _require_json(path)
            self.deepspeed = str(path)
        if self.output_dir == "" or Path(self.output_dir or ".").is_file():
            raise ValueError(f"output_dir is {self.output_dir!r}, which is not a folder; name one that is there or can be made")
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "best" and self.metric_for_best_model is None:
            raise ValueError("save_strategy is 'best' but no measure is named; pass --metric-for-best-model loss, and an --eval-strategy")
        super().__post_init__()
        self._check_reports()
        self._check_schedule()
        self._check_launcher()
        if self.process_index > 0:  # the first process speaks for all; errors are still printed
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            disable_progress_bar()
        self.logging_nan_inf_filter = False  # it would log a loss that is not a number as 0
        if self.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible, but one process trains on one: the first. To use all, start the stage with `deepspeed` or `torchrun`",
                self.n_gpu,
            )
            self._n_gpu = 1
        if self.deepspeed:
            if "paged" in OptimizerNames(self.optim).value:
                raise ValueError(
                    f"optim is {str(OptimizerNames(self.optim).value)!r}, which DeepSpeed does not take; pass --optim adamw_torch, or "
                    "leave --deepspeed out"
                )
            _check_engine(self.hf_deepspeed_config, str(self.deepspeed))
            # Models are loaded whole: transformers would load parts of them as ZeRO-3 shards, in the engine's type, beside parts that are
            # neither. The engine shares all of them out at once when training starts.
            unset_hf_deepspeed_config()

    def _check_reports(self) -> None:
        """Raise ValueError where training is to be reported to a program that is not installed."""
        for name in self.report_to or ():
            if name not in (available := get_available_reporting_integrations()):
                raise ValueError(
                    f"report_to is {name!r}, which is unknown or not installed here; install it, or choose one of {', '.join(['none', *available])}"
                )

    def _check_schedule(self) -> None:
        """Raise ValueError where the schedule does not take its settings."""
        steps = max(self.max_steps, 1)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(
                self.lr_scheduler_type,
                optimizer,
                self.get_warmup_steps(steps),
                steps,
                self.lr_scheduler_kwargs,  # type: ignore[arg-type]
            )
        except (TypeError, ValueError, AttributeError) as error:  # each schedule has words of its own
            raise ValueError(
                f"lr_scheduler_type {str(SchedulerType(self.lr_scheduler_type).value)!r} does not go with lr_scheduler_kwargs "
                f"{self.lr_scheduler_kwargs!r}: {error}"
            ) from None

    def _check_launcher(self) -> None:
        """Raise ValueError where `accelerate launch` brings an engine or a precision that the settings do not name."""
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or (self.deepspeed_plugin and not self.deepspeed):
            raise ValueError(
                "accelerate launch sets up FSDP or DeepSpeed of its own; leave it out there and pass --deepspeed deepspeed/zero2"
            )
        if self.mixed_precision != ("bf16" if self.bf16 else "no"):
            raise ValueError(
                f"accelerate launch sets --mixed_precision {self.mixed_precision}, but bf16 is {self.bf16}; leave it out there and pass --bf16"
            )

    @property
    def weights_dtype(self) -> torch.dtype:
        """Return the type of frozen weights. Trainable ones are float32, or DeepSpeed keeps float32 copies of them."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def validates(self) -> bool:
        """Return whether the validation loss is wanted (eval_strategy, eval_on_start)."""
        return self.eval_on_start or str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no"

    def open_data(self) -> PreparedData:
        """Open the prepared data that these settings name; on several nodes it must be the same on each."""
        keep_freed_memory()
        cache = Cache(self.data_cache, self.data_cache_size)
        data = together(PreparedData, self.data, self.exclude_failures, self.split_file or None, cache)
        readers = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * max(1, self.dataloader_num_workers)
        together(data.require_room, readers * self.train_batch_size)
        require_same_start(self, data)
        return data


@dataclass
class ImageArguments(StageArguments):
    """Further settings of the stages that see volumes."""

    augmentation: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={"help": "changes of training volumes: none, intensity, default, or settings as JSON (see datasets/augmentation.py)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = Augmentation.read(self.augmentation)
        self.augmentation = None if chosen is None else chosen.to_dict()  # every amount stands in the record of the run


def find_config(name: str, ending: str) -> Path:
    """Return the file of this name, or the package's own where there is none.

    The package's are named by their path below med3dvlm/configs, with or without the ending, as demo/stage1_siglip or deepspeed/zero2, or by their
    place in the repository: stages/configs/demo/stage1_siglip.yaml, ds_configs/zero2.json.
    """
    path = Path(name)
    if path.is_file():
        return path
    below = name.removeprefix("stages/configs/").removesuffix(ending)
    below = f"deepspeed/{below.removeprefix('ds_configs/')}" if below.startswith("ds_configs/") else below
    ours = CONFIGS / f"{below}{ending}"
    return ours if ours.is_file() else path


def configurations() -> list[str]:
    """Return the names of the package's own settings of stages."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.yaml"))


def _gpu_has_bfloat16() -> bool:
    """Return whether there is a GPU, or another accelerator, that computes in bfloat16 itself."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available())


def _require_json(path: Path) -> None:
    """Raise ValueError where DeepSpeed's configuration is not there or no JSON object."""
    if not path.is_file():
        raise ValueError(
            f"{path}, DeepSpeed's configuration, is neither a file nor one of the package, as deepspeed/zero2, zero3 and zero3_offload are"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}, DeepSpeed's configuration, is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}, DeepSpeed's configuration, must hold settings by name, as deepspeed/zero2 of the package does")


def _check_engine(config: Any, path: str) -> None:
    """Raise ValueError where DeepSpeed's configuration contradicts the settings or names a ZeRO stage that does not exist."""
    if config.mismatches:
        contradictions = ", ".join(line.removeprefix("- ds ").replace(" vs hf ", " but ") for line in config.mismatches)
        raise ValueError(f'{path} contradicts the settings: {contradictions}; write "auto" there or change the setting')
    for part, reason in (
        ("optimizer", "it would let biases, norms and the temperature decay; the settings optim and weight_decay choose it"),
        ("scheduler", "the settings lr_scheduler_type and warmup_steps choose it"),
        ("data_types", "gradients are added up in the type of the weights"),
        ("torch_autocast", "it would keep frozen weights in float32; the setting bf16 chooses the precision"),
    ):
        if part in config.config:
            raise ValueError(f"{path} has a part {part!r}: {reason}; leave it out")
    stage = config.get_value("zero_optimization.stage")
    if stage not in ZERO_STAGES:
        raise ValueError(
            f"{path}: zero_optimization.stage is {stage!r} but must be one of {', '.join(map(str, ZERO_STAGES))}; where nothing is to be shared "
            "out, leave --deepspeed out and start the stage with `torchrun`"
        )
    for part in ("offload_optimizer", "offload_param"):
        if config.get_value(f"zero_optimization.{part}.device") == "nvme":
            raise ValueError(f"{path}: zero_optimization.{part}.device is 'nvme' but must be 'cpu': checkpoints are made in memory")


def identity_of(arguments: StageArguments, data_fingerprint: str, started_from: dict[str, str]) -> dict[str, Any]:
    """Return the identity of a training for JSON: the settings that shape what is learned, with fingerprints in place of paths.

    The length of the training is no part of it, so that a finished one can be asked for more.
    """
    settings = arguments.to_dict()
    ours = {field.name for field in fields(arguments) if field.init} - {field.name for field in fields(TrainingArguments)} - FREE
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    identity = {name: settings[name] for name in (*LEARNING, *sorted(ours)) if name in settings}
    identity |= {"batch_size": batch_size, "data": data_fingerprint, **started_from}
    return dict(json.loads(json.dumps(identity)))
