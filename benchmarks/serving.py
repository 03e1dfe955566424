"""Compare the batching engine with one answer after the other, in the same run.

    python -m benchmarks.serving --model outputs/demo-full/model
    python -m benchmarks.serving --size smollm2
    python -m benchmarks.serving --vllm-python vllm/bin/python      # beside vLLM, see benchmarks/vllm_server.py

Without --model, a model of random weights: the demo's encoder, and a language model of the demo's or SmolLM2-135M's size; every answer then has its
full length. Measured are sessions that ask three questions each, as programs do that wait for one answer before the next question, about a
scan of their own that is encoded already (median seconds to the first token and to the end); reports that are written in parallel (tokens a
second); the first question about a scan, encoder included, beside a further one (seconds to the first token); and how the process grows over
many requests; with --vllm-python, reports by vLLM beside the own engine. One after the other means an engine with one slot that keeps nothing.
Writes <output>/serving.json and .md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import vllm_server
from benchmarks.rehearsal_report import machine
from med3dvlm import Med3DChat, Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, VolumeProcessor
from med3dvlm.checkpoints.export import save_language_model
from med3dvlm.files import write_json, write_text
from med3dvlm.inference.engine import Engine, Request
from med3dvlm.inference.transformers_engine import TransformersEngine
from med3dvlm.inference.vllm_engine import VllmEngine
from med3dvlm.inference.vllm_sources import Server
from med3dvlm.programs import Parser, positive, run
from med3dvlm.prompts import REPORT_PROMPTS
from med3dvlm.tables import markdown_table

QUESTIONS = ("Which organ is abnormal?", "What abnormality is seen?", "Is there a pleural effusion, and on which side?")
SIZES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 1000},
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}  # fmt: skip
SCAN = (32, 64, 64)
ENCODER = {"blocks": [1, 1, 2, 1], "widths": [16, 32, 64, 128, 256], "stem_layers": 2, "stem_stride": 2, "layer_scale": 0.1}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def random_chat(size: str) -> Med3DChat:
    """Weights as they are drawn, answers that never end by themselves."""
    torch.manual_seed(0)
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bare.train_from_iterator([*REPORT_PROMPTS, *QUESTIONS], trainer)
    words = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token=special[0], eos_token=special[1], extra_special_tokens=special[2:], chat_template=TEMPLATE
    )
    text = LlamaConfig(**SIZES[size], max_position_embeddings=4096, bos_token_id=None, eos_token_id=1)  # type: ignore[arg-type]
    config = Med3DVLMConfig("dcformer_nano", ENCODER, SCAN, image_levels=(-3, -2), text_config=text, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=SCAN), words, config.num_image_tokens)
    chat = Med3DChat(Med3DVLM(config, language_model=LlamaForCausalLM(text)), processor)
    chat.ends.clear()
    return chat


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def sessions(engine: TransformersEngine, scans: Sequence[Any], tokens: int) -> dict[str, float]:
    """Medians of all questions of all sessions, seconds from asking."""

    def session(scan: Any) -> list[tuple[float, float]]:
        history: list[dict[str, str]] = []
        times = []
        for question in QUESTIONS:
            history += asked(question)
            said = engine.generate([Request(scan, list(history), tokens)])[0].result()
            history.append({"role": "assistant", "content": said.text})
            times.append((said.first_seconds, said.seconds))
        return times

    started = time.perf_counter()
    with ThreadPoolExecutor(len(scans)) as pool:
        times = [each for one in pool.map(session, scans) for each in one]
    first, whole = (statistics.median(column) for column in zip(*times, strict=True))
    return {"first": first, "whole": whole, "total": time.perf_counter() - started}


def reports(engine: Engine, scans: Sequence[Any], tokens: int) -> dict[str, float]:
    """Tokens a second, of all reports together."""
    started = time.perf_counter()
    streams = engine.generate([Request(scan, asked(REPORT_PROMPTS[0]), tokens) for scan in scans])
    count = sum(len(stream.result().tokens) for stream in streams)
    return {"tokens_per_second": count / (time.perf_counter() - started)}


def known_scan(chat: Med3DChat, draw: Callable[[], torch.Tensor], repeats: int) -> dict[str, float]:
    """Seconds from a prepared scan to the first token of the first question, and from a further question to its first token."""
    engine, first, further = TransformersEngine(chat), [], []
    for _ in range(repeats):
        scan, started = draw(), time.perf_counter()
        features = chat.encode(scan)
        engine.generate([Request(features, asked(QUESTIONS[0]), 1)])[0].result()
        first.append(time.perf_counter() - started)
        further.append(engine.generate([Request(features, asked(QUESTIONS[1]), 1)])[0].result().first_seconds)
    return {"first": statistics.median(first), "further": statistics.median(further)}


def memory(chat: Med3DChat, draw: Callable[[], torch.Tensor], requests: int, tokens: int) -> dict[str, float]:
    """MiB of the process after a quarter of the requests, and after all, each about a scan of its own. The keys and values kept are few, so
    that they are full before."""
    engine, process = TransformersEngine(chat, prefix_bytes=2**25), psutil.Process()
    sizes = []
    for number in range(1, requests + 1):
        request = Request(chat.encode(draw()), asked(QUESTIONS[number % 3]), tokens)
        engine.generate([request])[0].result()
        if number in (max(1, requests // 4), requests):
            sizes.append(process.memory_info().rss / 2**20)
    return {"quarter": sizes[0], "all": sizes[-1]}


def beside_vllm(chat: Med3DChat, scans: Sequence[Any], tokens: int, python: str, folder: Path) -> dict[str, dict[str, float]]:
    """Tokens a second of reports about the scans, all at once, by the own engine and by a vLLM server, each the second time that it is asked."""
    save_language_model(chat.model, chat.processor, folder)
    found = {}
    with vllm_server.serving(python, folder, chat.model.config.text_config.max_position_embeddings, folder / "server.log") as url:
        for name, engine in (("own", TransformersEngine(chat, len(scans), prefix_bytes=0)), ("vllm", VllmEngine(chat, Server(url)))):
            reports(engine, scans, 8)
            found[name] = reports(engine, scans, tokens)
            engine.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of a trained model (default: random weights)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the random language model (default: %(default)s)")
    parser.add_argument("--sessions", type=positive, default=20, help="(default: %(default)s)")
    parser.add_argument("--reports", type=positive, default=8, help="in parallel (default: %(default)s)")
    parser.add_argument("--answer-tokens", type=positive, default=16, help="of an answer, at most (default: %(default)s)")
    parser.add_argument("--report-tokens", type=positive, default=128, help="of a report, at most (default: %(default)s)")
    parser.add_argument("--requests", type=positive, default=1000, help="over which memory is watched (default: %(default)s)")
    parser.add_argument("--vllm-python", metavar="PYTHON", help="the interpreter of an environment that has vLLM, to compare with")
    parser.add_argument(
        "--vllm-reports", type=positive, default=32, help="in parallel, by vLLM and by the own engine (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    chat = random_chat(arguments.size) if arguments.model is None else Med3DChat.from_pretrained(arguments.model)
    size = chat.processor.image_processor.size

    def draw() -> torch.Tensor:
        return torch.rand(1, *size)

    scans = [chat.encode(draw()) for _ in range(max(arguments.sessions, arguments.reports))]
    results: dict[str, Any] = {key: str(value) for key, value in vars(arguments).items() if key != "output"}
    results |= {"threads": torch.get_num_threads(), "torch": torch.__version__, **machine()}
    results["language_parameters"] = sum(parameter.numel() for parameter in chat.model.language_model.parameters())
    results["image_tokens"] = chat.processor.num_image_tokens
    reports(TransformersEngine(chat), scans[:2], 4)  # warms up
    for name, make in (("together", lambda: TransformersEngine(chat)), ("one by one", lambda: TransformersEngine(chat, 1, prefix_bytes=0))):
        results[name] = {
            "sessions": sessions(make(), scans[: arguments.sessions], arguments.answer_tokens),
            "reports": reports(make(), scans[: arguments.reports], arguments.report_tokens),
        }
    results["known_scan"] = known_scan(chat, draw, 9)
    results["memory"] = memory(chat, draw, arguments.requests, arguments.answer_tokens)
    if arguments.vllm_python is not None:
        with TemporaryDirectory() as folder:
            many = [chat.encode(draw()) for _ in range(arguments.vllm_reports)]
            results["beside_vllm"] = beside_vllm(chat, many, arguments.report_tokens, arguments.vllm_python, Path(folder))
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "serving.json", results)
    write_text(arguments.output / "serving.md", table(results))
    print(table(results))


def table(results: dict[str, Any]) -> str:
    one, all_ = results["one by one"], results["together"]
    known, grown = results["known_scan"], results["memory"]

    def row(name: str, before: float, after: float) -> list[str]:
        return [name, f"{before:.3g}", f"{after:.3g}", f"{after / before:.2f}"]

    rows = [
        row(f"{results['sessions']} sessions x 3 questions: first token, s", one["sessions"]["first"], all_["sessions"]["first"]),
        row("the same: whole answer, s", one["sessions"]["whole"], all_["sessions"]["whole"]),
        row(f"{results['reports']} reports: tokens/s", one["reports"]["tokens_per_second"], all_["reports"]["tokens_per_second"]),
        row("first token: first question (encoder included), further question, s", known["first"], known["further"]),
        row(f"memory after a quarter of {results['requests']} requests, after all, MiB", grown["quarter"], grown["all"]),
    ]
    about = (
        f"{results['language_parameters'] / 1e6:.1f} M parameters, {results['image_tokens']} image tokens, {results['threads']} of "
        f"{results['cores']} cores ({results['processor']}), torch {results['torch']}."
    )
    text = f"{about}\n\n{markdown_table(('what', 'one by one', 'together', 'ratio'), rows)}\n"
    if "beside_vllm" in results:
        own, vllm = (results["beside_vllm"][name]["tokens_per_second"] for name in ("own", "vllm"))
        compared = [row(f"{results['vllm_reports']} reports at once: tokens/s", own, vllm)]
        text += f"\n{markdown_table(('what', 'own engine', 'vLLM', 'ratio'), compared)}\n"
    return text


if __name__ == "__main__":
    sys.exit(run(main))
