import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from med3dvlm import programs
from med3dvlm.training import contrastive as contrastive_training
from med3dvlm.training import ct_clip, stage0_language_model, stage1_siglip, stage2_projector, stage3_lora
from tests.stages.running import Run, name_of


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, repository: Path, prepared: Path, tiny_models: SimpleNamespace, tmp_path: Path
) -> Callable[..., Run]:
    """run(stage, "--flag", value, ...) runs the smoke recipe on the tiny models in this process, with a new output folder unless given."""
    inputs = {
        stage0_language_model: (),
        stage1_siglip: ("--text-encoder", tiny_models.text_encoder),
        ct_clip: ("--train-split", "train"),
        stage2_projector: ("--clip", tiny_models.clip, "--language-model", tiny_models.language_model),
        stage3_lora: ("--model", tiny_models.vlm, "--merged", ""),
    }
    count = iter(range(100))

    def run_stage(stage: ModuleType, *flags: object, output: Path | None = None) -> Run:
        output = output or tmp_path / f"run{next(count)}"
        config = repository / "stages" / "configs" / "smoke" / f"{name_of(stage)}.yaml"
        flags = ("--config", config, "--data", prepared, "--output-dir", output, *inputs[stage], *flags)
        result = Run(output, {}, {}, set(), set())

        def watched(trainer: Any, *rest: Any, **more: Any) -> None:
            result.before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            result.parameters = {name for name, _ in trainer.model.named_parameters()}
            result.trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
            run_training(trainer, *rest, **more)
            result.after = {name: value.clone() for name, value in trainer.model.state_dict().items()}

        home: Any = stage if hasattr(stage, "run_training") else contrastive_training
        run_training = home.run_training
        with monkeypatch.context() as patch:
            patch.setattr(home, "run_training", watched)
            if code := programs.run(stage.main, [*map(str, flags)], f"{name_of(stage)}.py"):
                sys.exit(code)
        return result

    return run_stage
