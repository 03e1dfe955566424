"""Measure one training step of the CT-CLIP path at the paper's size: seconds and memory, with and without gradient checkpointing.

    python -m benchmarks.ct_clip_training
    python -m benchmarks.ct_clip_training --encoder dcformer_nano --size 128,256,256 --batch 2 --runs 3

The text encoder has CXR-BERT's size and random weights (109 million parameters), its texts are full, 512 tokens; AdamW steps. The loss of a
single pair is 0, so that of a second, made of fixed numbers, keeps its gradients alive. Each way runs in a process of its own, whose largest
memory counts; after a warm-up step the median of `--runs` steps. Prints a table.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from transformers import BertConfig

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, evaluation
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.cli.options import parse_size
from med3dvlm.encoders.base import bfloat16_is_fast
from med3dvlm.programs import Parser, positive, run

WAYS = {"all kept": [], "computed again": ["--recompute"]}


def step_cost(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step and GB of this process."""
    keep_freed_memory()
    torch.manual_seed(0)
    text = BertConfig(vocab_size=30522)  # the rest is BERT-base by default, as CXR-BERT is
    config = Med3DCLIPConfig(arguments.encoder, size=arguments.size, text_config=text, projection_dim=512, loss="clip")
    model = Med3DCLIP(config).train()
    if arguments.recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    volumes = torch.rand(arguments.batch, 1, *arguments.size) * 2 - 1
    ids = torch.randint(0, 30522, (arguments.batch, 512))
    other = torch.nn.functional.normalize(torch.randn(1, 512), dim=-1)
    seconds = []
    for _ in range(1 + arguments.runs):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bfloat16):
            output = model(volumes, ids, torch.ones_like(ids), return_loss=False)
            loss = model.contrast(torch.cat([output.image_embeds, other]), torch.cat([output.text_embeds, -other]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[1:]), "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="dcformer_tiny", help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=(256, 512, 512), metavar="D,H,W", help="default: 256,512,512")
    parser.add_argument("--batch", type=positive, default=1, help="volumes (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=2, help="steps after the warm-up (default: %(default)s)")
    parser.add_argument("--bfloat16", action="store_true", help="autocast; the encoder computes in float32 where the CPU is faster at that")
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(step_cost(arguments)))
        return
    rows = []
    for name, flags in WAYS.items():
        command = [sys.executable, "-m", "benchmarks.ct_clip_training", *sys.argv[1:], "--one", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            rows.append((name, None, f"ended with {done.returncode}"))  # -9: the system had no memory left
        else:
            cost = json.loads(done.stdout.splitlines()[-1])
            rows.append((name, f"{cost['seconds']:.1f}", f"{cost['gb']:.1f}"))
        print(f"{name}: {rows[-1][1]} s, {rows[-1][2]} GB", file=sys.stderr)
    size = "x".join(map(str, arguments.size))
    print(f"{arguments.encoder}, {arguments.batch}x1x{size}, {torch.get_num_threads()} threads, fast in bfloat16: {bfloat16_is_fast()}\n")
    print(evaluation.markdown_table(("activations between stages", "seconds a step", "GB"), rows))


if __name__ == "__main__":
    sys.exit(run(main))
