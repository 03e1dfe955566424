"""A chat with a language model in 8 or 4 bits: its answers, and the message when it is loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch

from med3dvlm import Med3DChat, cli
from med3dvlm.inference.quantized import REPORTS
from med3dvlm.models.quantized import Int8Linear, round_to_quantized
from med3dvlm.prompts import REPORT_PROMPTS
from tests import random_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of width 64, which NF4 needs on the CPU."""
    folder, chat = tmp_path_factory.mktemp("models") / "random", random_chat.build("llama", hidden_size=64, intermediate_size=128)
    chat.model.save_pretrained(folder)
    chat.processor.save_pretrained(folder)
    return folder


def agreement(one: Med3DChat, other: Med3DChat) -> float:
    """Return how often both models predict the same next token, given the same preceding tokens."""
    volume = torch.zeros(1, *one.processor.image_processor.size)
    same = []
    for report in REPORTS:
        messages = [{"role": "user", "content": REPORT_PROMPTS[0]}]
        start = one.processor.encode(messages, generate=True)["input_ids"]
        row = one.processor.encode([*messages, {"role": "assistant", "content": report}])["input_ids"]
        end = max(place for place, token in enumerate(row) if token in one.ends) + 1
        chosen = []
        for chat in (one, other):
            with torch.no_grad():
                logits = chat.model(torch.tensor([row[: end - 1]]), image_features=chat.encode(volume)).logits[0, len(start) - 1 :]
            chosen.append(logits.argmax(dim=-1))
        same += (chosen[0] == chosen[1]).tolist()
    return sum(same) / len(same)


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("med3dvlm")]


def test_eight_bits_give_nearly_the_same_answers(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored, quantized = Med3DChat.from_pretrained(folder), Med3DChat.from_pretrained(folder, quantize="int8")
    for name, layer in quantized.model.language_model.named_modules():
        if isinstance(layer, Int8Linear):
            stored.model.language_model.get_submodule(name).weight.data = layer.codes * layer.scale[:, None]
    scan = torch.rand(1, *stored.processor.image_processor.size)
    assert quantized.ask(scan, "Which organ?", max_new_tokens=20).text == stored.ask(scan, "Which organ?", max_new_tokens=20).text
    assert agreement(stored, quantized) == 1 and not ours(caplog)


def test_low_agreement_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    stored, quantized = Med3DChat.from_pretrained(folder), Med3DChat.from_pretrained(folder, quantize="nf4")
    expected = agreement(stored, quantized)
    assert expected < 0.9  # random weights: nothing was learned that could outlive rounding
    (said,) = ours(caplog)
    assert said.startswith(f"In nf4 this language model gives another next token than before at {100 * (1 - expected):.0f} % of")
    round_to_quantized(stored.model.language_model)
    scan = torch.rand(1, *stored.processor.image_processor.size)
    assert quantized.ask(scan, "Which organ?", max_new_tokens=20).text == stored.ask(scan, "Which organ?", max_new_tokens=20).text


def test_commands_accept_quantize(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan = tmp_path / "scan.npy"
    np.save(scan, np.random.default_rng(0).integers(-1000, 1000, (10, 20, 30)).astype(np.int16))
    assert cli.main(["report", str(folder), str(scan), "--quantize", "int8", "--max-new-tokens", "5"]) == 0
    for options, reason in (
        (("--quantize", "int3"), "quantize is 'int3' but must be int8 or nf4"),
        (("--quantize", "int8", "--vllm-url", "http://127.0.0.1:1"), "vLLM quantises by its own options"),
    ):
        capsys.readouterr()
        assert cli.main(["report", str(folder), str(scan), *options]) == 2 and reason in capsys.readouterr().err
