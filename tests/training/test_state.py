"""Saved state of a training: a resumed optimiser takes the same steps as an uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from med3dvlm.training import state as training_state
from med3dvlm.training.state import TrainingState, write_state

OPTIMISERS: dict[str, Any] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.05, weight_decay=0.1),
    "fused": lambda weights: torch.optim.AdamW(weights, 0.05, weight_decay=0.1, fused=True),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, 0.05, momentum=0.5, weight_decay=0.1),
    "momentum": lambda weights: torch.optim.SGD(weights, 0.05, momentum=0.9, weight_decay=0.1),
    "sgd": lambda weights: torch.optim.SGD(weights, 0.05),
}


def model(seed: int) -> nn.Module:
    """Return a model with batch norm, a frozen layer, and a weight that never gets a gradient."""
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    made[2].requires_grad_(False)
    made.register_parameter("idle", nn.Parameter(torch.randn(())))
    return made


def steps(made: nn.Module, optimizer: Any, batches: list[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        made(batch).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_next_steps_equal_those_of_an_uninterrupted_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_state, "FILE_BYTES", 64)
    batches = list(torch.randn(6, 8, 3))
    whole = model(1)
    optimizer = OPTIMISERS[name]([parameter for parameter in whole.parameters() if parameter.requires_grad])
    steps(whole, optimizer, batches[:3])
    write_state(tmp_path, whole, optimizer, writes=False)
    assert not list(tmp_path.iterdir())
    write_state(tmp_path, whole, optimizer, writes=True)
    kept = {key: value.clone() for key, value in whole.state_dict().items()}
    steps(whole, optimizer, batches[3:])

    again = model(2)
    again[2].load_state_dict(model(1)[2].state_dict())  # what does not train comes from where the training began
    state, optimizer = TrainingState(tmp_path), OPTIMISERS[name]([one for one in again.parameters() if one.requires_grad])
    state.set_weights(again)
    state.set_optimizer(again, optimizer)
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    assert again.idle not in optimizer.state and again.idle.grad is None
    steps(again, optimizer, batches[3:])
    for key, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key

    files = sorted(tmp_path.iterdir())
    keys = [key for path in files for key in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert len(files) > 1 and len(keys) == len(set(keys)) and not any(key.partition("/")[2].startswith("2.") for key in keys)


def test_a_paged_optimiser_takes_over_from_adam_and_back(tmp_path: Path) -> None:
    """bitsandbytes uses other names than Adam and divides in another order: weights differ by 2e-7, measured."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    batches = list(torch.randn(6, 8, 3))

    def trained(made: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in made.parameters() if parameter.requires_grad]

    whole = model(1)
    steps(whole, torch.optim.AdamW(trained(whole), 0.05, weight_decay=0.1), batches)
    parts = model(1)
    for number, make in enumerate((torch.optim.AdamW, bitsandbytes.optim.PagedAdamW32bit, torch.optim.AdamW)):
        optimizer = make(trained(parts), lr=0.05, weight_decay=0.1)
        if number:
            state = TrainingState(tmp_path)
            state.set_weights(parts)
            state.set_optimizer(parts, optimizer)
        steps(parts, optimizer, batches[2 * number : 2 * number + 2])
        write_state(tmp_path, parts, optimizer, writes=True)
    for name in ("0.weight", "1.weight", "1.bias"):  # batch norm leaves the bias before it a gradient of rounding alone
        assert torch.allclose(parts.get_parameter(name), whole.get_parameter(name), atol=2e-6), name


def test_a_folder_without_a_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no training_state-.* so it cannot be continued"):
        TrainingState(tmp_path)
