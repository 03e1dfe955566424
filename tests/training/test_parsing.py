"""The command line of a stage: defaults, YAML and flags, and one sentence for each wrong setting."""

from pathlib import Path

import pytest

import med3dvlm.training.arguments
import med3dvlm.training.environment
from med3dvlm.training.parsing import parse_arguments
from tests.training.toy import ToyArguments


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "toy.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_yaml_then_flags(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "data: there\ncolour: green\nspeed: 2\nlearning_rate: 1e-3\nmax_steps: 7\nuse_cpu: true\n")
    assert parse_arguments(ToyArguments, ["--data", "here", "--use-cpu", "true"]).colour == "red"
    arguments = parse_arguments(ToyArguments, ["--config", config])
    assert (arguments.data, arguments.colour, arguments.speed, arguments.max_steps) == ("there", "green", 2, 7)
    assert arguments.learning_rate == 1e-3  # YAML reads 1e-3 as a text
    arguments = parse_arguments(ToyArguments, ["--max-steps", "9", f"--config={config}", "--colour", "blue"])
    assert (arguments.data, arguments.colour, arguments.max_steps) == ("there", "blue", 9)


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("data: x\ncolor: blue\n", [], "unknown keys color; did you mean colour?"),
        ("data: x\nzzz: 1\n", [], "unknown keys zzz; see --help"),
        ("data: x\n1: 2\n", [], "unknown keys 1;"),
        ("data: x\n", ["--color", "blue"], "unknown: --color blue; did you mean colour?"),
        ("data: x\n", ["--color=blue"], "unknown: --color=blue; did you mean colour?"),
        ("data: x\n", ["--col", "blue"], "unknown: --col blue"),  # no guessing from the first letters
        ("data: x\n", ["blue"], "unknown: blue; every setting is --name value"),
        ("data: x\n", ["--max-steps", "many"], "invalid int value: 'many'"),
        ("data: x\nmax_steps: many\n", [], "invalid int value: 'many'"),
        ("data: x\nsave_total_limit: 1\n", [], "save_total_limit is 1 but must be at least 2: while a checkpoint"),
        ("data: x\nmax_steps: [1]\n", [], "toy.yaml: max_steps is [1] but must be int"),
        ("data: x\nmax_steps: 1.5\n", [], "max_steps is 1.5 but must be int"),
        ("data: x\nlearning_rate: null\n", [], "learning_rate is None but must be float"),
        ("data: x\nlearning_rate: {a: 1}\n", [], "learning_rate is {'a': 1} but must be float"),
        ("data: x\neval_strategy: no\n", [], "eval_strategy is False but must be IntervalStrategy | str"),
        ("data: 5\n", [], "data is 5 but must be str"),
        ("colour: blue\n", [], "--data is missing"),
        ("- data\n", [], "must hold lines of `name: value`, not a list"),
        ("data: {\n", [], "toy.yaml is not valid YAML"),
        ("data: x\nlabel_smoothing_factor: 0.1\n", [], "label_smoothing_factor is 0.1 but must be 0.0: the models compute their losses"),
        ("data: x\nfp16: true\nuse_cpu: true\n", [], "fp16 is True but must be false: the models compute in float32 or bfloat16"),
        ("data: x\n", ["--neftune-noise-alpha", "5"], "neftune_noise_alpha is 5.0 but must be none"),
        (
            "data: x\n",
            ["--train-sampling-strategy", "batch_rebalance"],
            "is 'batch_rebalance' but must be random or sequential or group_by_length: no other order",
        ),
        ("data: x\nbf16: true\n", [], "no GPU here that computes in bfloat16; pass --use-cpu true to train on the CPU, or --bf16 false"),
        (
            "data: x\nuse_cpu: true\nbf16: true\ndeepspeed: {folder}/off.json\n",
            [],
            "bf16.enabled=False but bf16|bf16_full_eval=True; write",
        ),
        ("data: x\ndeepspeed: nowhere.json\n", [], "nowhere.json, DeepSpeed's configuration, is neither a file nor one of the package"),
        ("data: x\nuse_cpu: true\ndeepspeed: {folder}/adam.json\n", [], "adam.json has a part 'optimizer': it would let biases"),
        ("data: x\naverage_tokens_across_devices: false\n", [], "average_tokens_across_devices is False but must be true"),
        ("data: x\n", ["--accelerator-config", '{"split_batches": true}'], "accelerator_config is"),
        (
            "data: x\nuse_cpu: true\ndeepspeed: {folder}/five.json\n",
            [],
            "zero_optimization.stage is 5 but must be one of 1, 2, 3; where nothing",
        ),
        ("data: x\n", ["--config"], "--config: expected one argument"),
    ],
)
def test_a_wrong_setting_is_named_in_a_sentence(
    text: str, flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(med3dvlm.training.arguments, "is_torch_bf16_gpu_available", lambda: False)
    (tmp_path / "off.json").write_text('{"bf16": {"enabled": false}, "zero_optimization": {"stage": 2}}')
    (tmp_path / "adam.json").write_text('{"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}')
    (tmp_path / "five.json").write_text('{"zero_optimization": {"stage": 5}}')
    with pytest.raises(SystemExit) as stop:
        parse_arguments(ToyArguments, ["--config", yaml_file(tmp_path, text.replace("{folder}", str(tmp_path))), *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) <= 2  # how it is called, and what is wrong


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "accelerate launch sets --mixed_precision fp16, but bf16 is False"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "accelerate launch sets --mixed_precision bf16, but bf16 is False"),
        ("ACCELERATE_USE_FSDP", "true", "accelerate launch sets up FSDP or DeepSpeed of its own"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "accelerate launch sets up FSDP or DeepSpeed of its own"),
    ],
)
def test_what_accelerate_launch_brings_is_refused(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(ToyArguments, ["--data", "x", "--use-cpu", "true"])
    assert sentence in capsys.readouterr().err


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(ToyArguments, ["--config", "nowhere.yaml", "--data", "x"])
    assert (
        "nowhere.yaml is neither a file nor a configuration of the package; those are ablation/stage1_siglip, " in capsys.readouterr().err
    )


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_arguments(ToyArguments, ["--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n  {name}") for name in ("--config FILE", "--data", "--exclude-failures", "--colour", "--learning-rate")]
    assert places == sorted(places)  # ours first
