"""Measure attention of long rows: in pieces of branches, compared with a mask of all tokens by all tokens.

    python -m benchmarks.attention
    python -m benchmarks.attention --lengths 4096 --shared 1024

The attention of one layer of a Qwen2.5-0.5B with random weights, forward and backward, float32, on the CPU. A row is shared tokens and branches
of one length. Each measurement has a process of its own, whose CPU time and peak of memory are given, beyond what the layer and its inputs take
and with the mask.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from transformers import Qwen2Config, Qwen2Model

from med3dvlm.models.branch_attention import numbered, use_pieces
from med3dvlm.models.language_models import branch_scores
from med3dvlm.models.vlm_processor import branch_mask
from med3dvlm.programs import Parser, run

WAYS = ("mask", "pieces")


def measure(way: str, length: int, shared: int, branch: int, width: int) -> dict[str, float]:
    """Measure {"seconds" of CPU time, "gigabytes", "norm"} of one forward and backward; the norm of the gradient tells that ways agree."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8, hidden_size=width, intermediate_size=width * 38 // 7, num_hidden_layers=1, num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 448), attn_implementation="sdpa",
    )  # fmt: skip
    model = Qwen2Model(config)
    numbers = torch.cat([torch.zeros(shared), 1 + torch.arange(length - shared) // branch]).long()[None]
    places = (torch.arange(length - shared) % branch + shared).long()
    positions = torch.cat([torch.arange(shared), places])[None]
    embeds, weights = torch.randn(1, length, width, requires_grad=True), torch.randn(1, length, width)
    if way == "pieces":
        use_pieces(model)
    before, started = _peak(), time.process_time()
    mask = numbered(numbers) if way == "pieces" else branch_scores(config, branch_mask(numbers), positions, embeds.dtype)
    states, _ = model.layers[0].self_attn(embeds, position_embeddings=model.rotary_emb(embeds, positions), attention_mask=mask)
    (states * weights).sum().backward()
    seconds, gigabytes = time.process_time() - started, (_peak() - before) / 1e9
    assert embeds.grad is not None
    return {"seconds": seconds, "gigabytes": gigabytes, "norm": embeds.grad.norm().item()}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], help="tokens of a row (default: %(default)s)")
    parser.add_argument("--shared", type=int, default=320, help="tokens before the branches (default: %(default)s)")
    parser.add_argument("--branch", type=int, default=100, help="tokens of a branch (default: %(default)s)")
    parser.add_argument("--width", type=int, default=896, help="of the layer (default: %(default)s)")
    parser.add_argument("--way", choices=WAYS, help="measure this alone, for one length, and print JSON")
    arguments = parser.parse_args(argv)
    fixed = (arguments.shared, arguments.branch, arguments.width)
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.lengths[0], *fixed)))
        return
    print(f"{'tokens':>8}{'attention':>12}{'CPU s':>10}{'GB':>8}{'norm of the gradient':>24}")
    for length in arguments.lengths:
        for way in WAYS:
            words = ["--way", way, "--lengths", length, "--shared", fixed[0], "--branch", fixed[1], "--width", fixed[2]]
            command = [sys.executable, "-m", "benchmarks.attention", *map(str, words)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            print(f"{length:8}{way:>12}{found['seconds']:10.2f}{found['gigabytes']:8.2f}{found['norm']:24.6g}")
    print(f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(run(main))
