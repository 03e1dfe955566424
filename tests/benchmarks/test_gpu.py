"""The acceptance run for GPUs, tested on the CPU: refusal without a GPU, failing parts, and cheap parts at tiny sizes."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks import gpu, gpu_encoders, gpu_models
from tests.encoders import test_precision


def run(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    return gpu.main([*map(str, flags)])


def tiny(work: Path, device: str = "cpu") -> gpu.Settings:
    return gpu.Settings(device, True, work, layers=1, batch=2)


def table(monkeypatch: pytest.MonkeyPatch, *cases: Any) -> None:
    """Makes one part with these figures the only part; an exception given instead is raised."""

    def figures(one: Any) -> dict[str, Any]:
        if isinstance(one, Exception):
            raise one
        return dict(one)

    named = [(str(number), lambda one=one: figures(one)) for number, one in enumerate(cases)]
    monkeypatch.setattr(gpu, "PARTS", {"one": gpu.Part("One", lambda _: iter(named))})


def test_without_a_gpu_it_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(monkeypatch, "--output", tmp_path / "none") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "torch sees no GPU here" in said and "--device cpu --tiny" in said
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--device", "cpu")
    assert ended.value.code == 2 and "add --tiny" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_cheap_parts_pass_at_tiny_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part that depends on one that did not run is left out."""
    assert run(monkeypatch, "--device", "cpu", "--tiny", "--output", tmp_path, "--parts", "training", "models") == 0
    report = json.loads((tmp_path / "results.json").read_text())
    training, models = report["parts"]["training"], report["parts"]["models"]
    assert models["status"] == "left out" and models["reason"].startswith("prepared/summary.json is not there")
    assert training["status"] == "passed", training["reason"]
    forms = {case["case"]: case for case in training["cases"]}
    assert list(forms) == [f"{form}, {numbers}" for form in ("literal", "ours") for numbers in ("float32", "tf32", "bfloat16")]
    assert forms["ours, float32"]["difference"] < 1e-4
    ratio = forms["literal, bfloat16"]["seconds"] / forms["ours, bfloat16"]["seconds"]
    assert forms["ours, bfloat16"]["times_as_fast_as_literal"] == pytest.approx(ratio)
    text = (tmp_path / "results.md").read_text()
    assert f"bfloat16: {ratio:.2f} times as fast as the literal form" in text and f"torch {report['versions']['torch']}" in text
    assert not (tmp_path / "work").exists()


def test_a_case_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table(monkeypatch, {"seconds": 1.5}, ValueError("first line\nlast line"), {"seconds": 2.5})
    gpu.run_cases("one", tiny(tmp_path), tmp_path / "one.jsonl")
    first, second, third = (json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines())
    assert (first["seconds"], second["error"], third["seconds"]) == (1.5, "ValueError: last line", 2.5)


def test_a_missing_package_leaves_a_part_out_but_a_missing_module_of_ours_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for error, said in (
        (ModuleNotFoundError("No module named 'deepspeed.ops'", name="deepspeed.ops"), "the package deepspeed.ops is not installed"),
        (ImportError("\nIt requires the Torchvision library.\nSee its page."), "It requires the Torchvision library."),
    ):
        table(monkeypatch, error, {"seconds": 1.0})
        gpu.run_cases("one", tiny(tmp_path), tmp_path / "one.jsonl")
        *_, line = (tmp_path / "one.jsonl").read_text().splitlines()
        assert json.loads(line) == {"case": "one", "left_out": said}
    for error in (
        ModuleNotFoundError("No module named 'med3dvlm.no'", name="med3dvlm.no"),
        ImportError("cannot import name 'new' from 'torch'", name="torch"),
    ):
        table(monkeypatch, error)
        gpu.run_cases("one", tiny(tmp_path), tmp_path / "one.jsonl")
        *_, line = (tmp_path / "one.jsonl").read_text().splitlines()
        assert json.loads(line)["error"] == f"{type(error).__name__}: {error}"


def part_of(tmp_path: Path, name: str, seconds: float) -> dict[str, Any]:
    """Runs a part in its own process with this many seconds left."""
    for folder in ("logs", "work"):
        (tmp_path / folder).mkdir(exist_ok=True)
    arguments = argparse.Namespace(output=tmp_path, device="cpu", layers=1, batch=2, tiny=True)
    return gpu.run_part(name, arguments, time.monotonic() + seconds)


def test_the_time_limit_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert part_of(tmp_path, "precision", 19)["reason"] == "the minutes were used up"
    monkeypatch.setattr(gpu, "MIN_SECONDS", 0)
    monkeypatch.setattr(gpu, "REPORT_SECONDS", 0)
    ended = part_of(tmp_path, "precision", 0.3)
    assert (ended["status"], ended["reason"]) == ("left out", "the minutes were used up after 0 cases")
    assert ended["seconds"] < 5


def test_a_process_that_ends_early_is_a_failure_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table(monkeypatch)  # of which the process knows nothing, so that it does what a part that is no key of its table does
    failed = part_of(tmp_path, "one", 60)
    assert (failed["status"], failed["reason"]) == ("failed", "ended with 1: KeyError: 'one'")
    monkeypatch.setattr(gpu, "run_part", lambda *_: failed)
    assert run(monkeypatch, "--device", "cpu", "--tiny", "--output", tmp_path, "--parts", "one") == 1
    assert "ended with 1: KeyError: 'one'" in (tmp_path / "results.md").read_text()


def test_the_encoder_is_compared_with_its_literal_form() -> None:
    cases = [
        {"case": "literal, float32", "seconds": 3.0, "gb": 8.0},
        {"case": "literal, bfloat16", "seconds": 2.0, "gb": 4.0},
        {"case": "ours, bfloat16, compiled", "seconds": 0.5, "gb": 2.0},
        {"case": "ours, float32", "error": "out of memory"},
    ]
    assert gpu.compare({"cases": cases}) == ["bfloat16 compiled: 4.00 times as fast as the literal form at 0.50 times its memory"]
    assert (cases[2]["times_as_fast_as_literal_float32"], cases[2]["memory_of_literal_float32"]) == (6.0, 0.25)


def test_a_difference_from_float64_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = gpu_encoders.against_float64("cpu", "dcformer", "training", "float32")
    assert "error" not in figures and 0 < figures["tokens"] < 1e-5 and 0 < figures["gradients"] < 1e-4
    monkeypatch.setattr(test_precision, "TOLERANCES", dict.fromkeys(test_precision.TOLERANCES, (1e-12, 1.0)))
    figures = gpu_encoders.against_float64("cpu", "dcformer", "training", "float32")
    assert figures["error"] == "tokens and statistics differ from float64 by more than is allowed"
    assert str(gpu_encoders.largest([1.0, float("nan"), 2.0])) == "nan"


def test_attention_without_a_fused_kernel_is_an_error(tmp_path: Path) -> None:
    q, bias = torch.rand(1, 2, 8, 8), torch.zeros(8, 8, requires_grad=True)
    sdpa = nn.functional.scaled_dot_product_attention

    def found(call: Any, model: nn.Module | None = None, device: str = "cuda", masked: bool = True) -> Any:
        return gpu_models.attended(tiny(tmp_path, device), model or nn.Identity(), call, masked).get("error")

    assert found(lambda: sdpa(q, q, q)) is None
    assert found(lambda: q @ q) == "scaled_dot_product_attention was not called"
    assert found(lambda: sdpa(q, q, q, attn_mask=bias)) == "torch took its plain formula"
    assert found(lambda: sdpa(q, q, q, attn_mask=bias), device="cpu") is None
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    eager = BertModel(BertConfig(**small, attn_implementation="eager"))
    assert found(lambda: sdpa(q, q, q), eager) == "a sub-model is configured to run eager attention"


def test_generation_counts_tokens(tmp_path: Path) -> None:
    (name, case), _ = gpu_models.generation(tiny(tmp_path))
    figures = case()
    assert name == "1 at a time" and figures["tokens"] == 4
    assert figures["tokens_a_second"] == pytest.approx(4 / figures["seconds"])


@pytest.mark.slow
def test_a_stage_takes_its_steps(tmp_path: Path, prepared: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "prepared").symlink_to(prepared)
    stage = part_of(tmp_path, "stage0", 300)
    assert stage["status"] == "passed", stage["reason"]
    (figures,) = stage["cases"]
    assert figures["steps"] == 3 and 5 < figures["first_loss"] < 10 and figures["peak_gb"] > 0.1
