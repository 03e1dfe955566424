"""The state of a training by the names of its weights, so that any engine and any number of processes can continue it.

A checkpoint's safetensors hold, whole, as KIND/NAME:

- weights/NAME: what trains; where an engine keeps float32 copies, those;
- buffers/NAME: running statistics;
- exp_avg/NAME, step/NAME and so on: what the optimiser knows of a weight.

What does not train is not among them: it is loaded anew from where the training began.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from med3dvlm.files import atomic_file

STATE_FILES = "training_state-*.safetensors"
FILE_BYTES = 2**31  # after which a further file is begun: the process that writes holds one in memory
PAGED = {"state1": "exp_avg", "state2": "exp_avg_sq"}  # bitsandbytes' names of Adam's state
WEIGHTS, BUFFERS, COUNTER = "weights", "buffers", "step"


def whole(*parameters: nn.Parameter, changed: bool = False) -> AbstractContextManager[None]:
    """Gather sharded parameters while the context is entered; under ZeRO-3 each process otherwise holds a shard.

    Args:
        changed: every process changes them, all alike, and the shards follow.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    from deepspeed import zero

    gathered: AbstractContextManager[None] = zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None)
    return gathered


def write_state(folder: Path, model: nn.Module, optimizer: Any, writes: bool) -> None:
    """Save what the training has learned. Every process calls it, since under ZeRO each has a part; one of them writes.

    Args:
        optimizer: torch's own, or the engine's that DeepSpeed made of it.
    """
    held: dict[str, Tensor] = {}
    files = size = 0
    for key, value in _learned(model, optimizer):
        if writes:
            held[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            size += held[key].nbytes
            if size >= FILE_BYTES:
                _write(folder, files, held)
                files, size, held = files + 1, 0, {}
    if held:
        _write(folder, files, held)


def _write(folder: Path, number: int, values: dict[str, Tensor]) -> None:
    with atomic_file(folder / STATE_FILES.replace("*", f"{number:05d}")) as aside:
        save_file(values, aside)


def _learned(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in _buffers(model).items():
        yield f"{BUFFERS}/{name}", buffer
    known = known_by(optimizer)
    for name, parameter in _trained(model).items():
        for kind, value in known.read(parameter).items():
            yield f"{kind}/{name}", value


class TrainingState:
    """The state that `write_state` saved in a folder.

    Raises:
        FileNotFoundError: nothing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.places: dict[str, dict[str, Any]] = defaultdict(dict)  # name -> kind -> open file
        for path in sorted(Path(folder).glob(STATE_FILES)):
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118  it is not a dictionary
                kind, _, name = key.partition("/")
                self.places[name][kind] = file
        if not self.places:
            raise FileNotFoundError(
                f"{folder} holds no {STATE_FILES}, so it cannot be continued; delete it, or choose another --output-dir"
            )

    def read(self, name: str, kind: str) -> Tensor:
        """Return one value, whole, on the CPU."""
        value: Tensor = self.places[name][kind].get_tensor(f"{kind}/{name}")
        return value

    def kinds(self, name: str) -> list[str]:
        """Return the kinds of optimiser state of a weight; none where it never got a gradient."""
        return [kind for kind in self.places[name] if kind not in (WEIGHTS, BUFFERS)]

    def set_weights(self, model: nn.Module) -> None:
        """Load weights and running statistics into a model."""
        for name, buffer in _buffers(model).items():
            buffer.copy_(self.read(name, BUFFERS))
        for name, parameter in _trained(model).items():
            with torch.no_grad(), whole(parameter, changed=True):
                parameter.copy_(self.read(name, WEIGHTS))

    def set_optimizer(self, model: nn.Module, optimizer: Any) -> None:
        """Load the optimiser's state, and the float32 copies of weights of an engine that keeps such."""
        known_by(optimizer).fill(self, _trained(model))


def known_by(optimizer: Any) -> "_Known | _KnownInShards":
    """Return the state of an optimiser, to be read and filled by parameter."""
    return _KnownInShards(optimizer) if hasattr(optimizer, "partition_count") else _Known(optimizer)


class _Known:
    """The state of torch's own optimisers."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        known = self.optimizer.state.get(parameter, {})
        values = {PAGED.get(kind, kind): value for kind, value in known.items()}
        return {WEIGHTS: parameter} | {kind: torch.as_tensor(value) for kind, value in values.items() if value is not None}

    def fill(self, saved: TrainingState, parameters: dict[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            parameter.grad = torch.zeros_like(parameter) if saved.kinds(name) else None
        self.optimizer.step()  # it makes the places for what is known
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data.copy_(saved.read(name, WEIGHTS))  # decay may have changed it
            known = self.optimizer.state.get(parameter, {})
            for kind in known:
                if (ours := PAGED.get(kind, kind)) in saved.kinds(name):
                    value = saved.read(name, ours)
                    known[kind] = known[kind].copy_(value) if isinstance(known[kind], Tensor) else int(value)


class _KnownInShards:
    """The state under ZeRO, which lays the parameters end to end and gives each process a part of them in float32."""

    linked = False

    def __init__(self, zero: Any) -> None:
        self.zero, self.state = zero, zero.optimizer.state
        self.shards_weights = hasattr(zero, "fp32_partitioned_groups_flat")
        self.flat = zero.fp32_partitioned_groups_flat if self.shards_weights else zero.single_partition_of_fp32_groups

    def read(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        values = {WEIGHTS: safe_get_full_fp32_param(parameter)}
        for kind, value in self.state[self.flat[0]].items():
            if kind == COUNTER:
                values[kind] = torch.tensor(float(value))
            elif value is not None:
                values[kind] = safe_get_full_optimizer_state(parameter, kind)
        return values

    def fill(self, saved: TrainingState, parameters: dict[str, nn.Parameter]) -> None:
        for number, flat in enumerate(self.flat):
            gradient, flat.grad = flat.grad, torch.zeros_like(flat)
            self.zero._optimizer_step(number)  # it makes the places for what is known
            flat.grad = gradient
        self._link()
        for name, parameter in parameters.items():
            self._set(parameter, saved.read(name, WEIGHTS))
            for kind in saved.kinds(name):
                if kind != COUNTER:
                    self._set(parameter, saved.read(name, kind), kind)
        counts = [float(saved.read(name, COUNTER)) for name in parameters if COUNTER in saved.kinds(name)]
        for flat in self.flat:
            if counts:  # of a weight that got its first gradient later, ZeRO counts as of the others
                value = self.state[flat][COUNTER]
                self.state[flat][COUNTER] = value.fill_(max(counts)) if isinstance(value, Tensor) else int(max(counts))

    def _link(self) -> None:
        """Let parameters find their parts of the state. ZeRO-2 (0.19) does so once, when one of its groups has a state alone."""
        if self.linked or self.shards_weights:
            return
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, flat in zip(self.zero.bit16_groups, self.flat, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, self.state)
        self.linked = True

    def _set(self, parameter: Any, value: Tensor, *kind: str) -> None:
        from deepspeed import utils

        if not self.shards_weights:
            (utils.safe_set_full_optimizer_state if kind else utils.safe_set_full_fp32_param)(parameter, value, *kind)
            return
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
        own = torch.zeros(size)  # the last part may be longer than what is left for it
        rest = value.flatten()[rank * size : (rank + 1) * size]
        own[: len(rest)] = rest
        (utils.safe_set_local_optimizer_state if kind else utils.safe_set_local_fp32_param)(parameter, own, *kind)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a model is saved with."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}
