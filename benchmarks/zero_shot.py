"""Compare the speed of zero-shot detection of the 18 findings with the literal protocol, by the same model and with the same probabilities.

    python -m benchmarks.zero_shot
    python -m benchmarks.zero_shot --model outputs/ct_clip/model --data outputs/ct_clip/prepared --split valid --studies 32
    python -m benchmarks.zero_shot --encoder dcformer_tiny --size 64,128,128 --studies 4

The literal way shows the model each volume with each of the 18 pairs of prompts, so it encodes a volume 18 times and every prompt as often as
there are volumes. Ours encodes volumes one by one and prompts once, as eval/zero_shot.py does. Both read a volume once, and begin with a
loaded model; they take turns after a warm-up, and the median run counts. Probabilities must be equal to 1e-5, or the program fails.

Without --model, a Med3DCLIP with random weights on random volumes: an encoder of the zoo and a small BERT, so that the image side dominates,
as it does at the papers' size. Writes <output>/zero_shot.json and .md.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from med3dvlm import Med3DCLIP, Med3DCLIPConfig, evaluation
from med3dvlm.allocator import keep_freed_memory
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.files import write_json, write_text
from med3dvlm.programs import Parser, positive, run
from med3dvlm.prompts import finding_prompts
from med3dvlm.reports.findings import FINDINGS_CT_RATE

Tokens = dict[str, Tensor]
PAIRS = [finding_prompts(name)[0] for name in FINDINGS_CT_RATE]
TOLERANCE = 1e-5


def random_model(encoder: str, size: tuple[int, int, int]) -> tuple[Med3DCLIP, Callable[[Sequence[str]], Tokens]]:
    """A Med3DCLIP with random weights, and a tokenizer that has a number for each letter."""
    torch.manual_seed(0)
    text = BertConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)
    model = Med3DCLIP(Med3DCLIPConfig(encoder, size=size, text_config=text, projection_dim=512, loss="clip"), BertModel(text)).eval()

    def tokenize(texts: Sequence[str]) -> Tokens:
        rows = [torch.tensor([ord(letter) for letter in one]) for one in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    return model, tokenize


@torch.no_grad()
def literal(model: Med3DCLIP, tokenize: Callable[[Sequence[str]], Tokens], volumes: Sequence[Callable[[], Tensor]]) -> Tensor:
    """(N, 18) probabilities: softmax over temperature times the similarities of volume and pair, each pair with its volume anew."""
    rows = []
    for read in volumes:
        volume, found = read(), []
        for pair in PAIRS:
            similar = model.encode_text(**tokenize(pair)) @ model.encode_image(volume)[0]
            found.append((model.temperature * similar).softmax(dim=0)[0])
        rows.append(torch.stack(found))
    return torch.stack(rows)


@torch.no_grad()
def ours(model: Med3DCLIP, tokenize: Callable[[Sequence[str]], Tokens], volumes: Sequence[Callable[[], Tensor]]) -> Tensor:
    """(N, 18) probabilities, as eval/zero_shot.py computes them."""
    present, absent = (model.encode_text(**tokenize([pair[side] for pair in PAIRS])).double() for side in (0, 1))  # (18, P)
    directions = model.temperature.double() * (present - absent)
    return torch.stack([(directions @ model.encode_image(read())[0].double()).sigmoid() for read in volumes]).float()


def check_equal(one: Tensor, other: Tensor) -> float:
    """The largest difference of two tables of probabilities. Raises ValueError if it exceeds TOLERANCE."""
    difference = float((one - other).abs().max())
    if difference > TOLERANCE:
        raise ValueError(f"the two ways differ by {difference:.1e} in a probability, so their times do not compare; they must be equal")
    return difference


def table(results: dict[str, Any]) -> str:
    rows = [[name, results[name]["seconds"], results[name]["seconds"] / results["studies"]] for name in ("literal", "ours")]
    size = "x".join(map(str, results["size"]))
    return (
        f"{results['studies']} volumes of {size}, {results['model']}, {results['threads']} threads: {results['times']:.1f} x faster, "
        f"probabilities equal to {results['difference']:.0e}.\n\n"
        + evaluation.markdown_table((f"median of {results['runs']} runs", "seconds", "a volume"), rows)
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a Med3DCLIP (default: random weights)")
    parser.add_argument("--data", help="prepared data, with --model")
    parser.add_argument("--split", default="test", help="of the data (default: %(default)s)")
    parser.add_argument("--encoder", default="dcformer_nano", help="without --model (default: %(default)s)")
    parser.add_argument("--size", default="64,128,128", help="D,H,W of a volume, without --model (default: %(default)s)")
    parser.add_argument("--studies", type=positive, default=8, help="(default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"))
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.data):
        raise ValueError("--model and --data belong together; give both, or neither for random weights")
    keep_freed_memory()
    if arguments.model:
        data = PreparedData(arguments.data)
        model, processor = load_clip(arguments.model)
        same_preprocessing(processor.image_processor, data)
        name, size = f"{model.config.encoder} of {arguments.model}", data.processor.size
        studies = data.studies(arguments.split)[: arguments.studies]
        volumes = [lambda study=study: load_volumes(data, [study]) for study in studies]

        def tokenize(texts: Sequence[str]) -> Tokens:
            return dict(processor(text=texts))
    else:
        size = tuple(int(number) for number in arguments.size.split(","))
        model, tokenize = random_model(arguments.encoder, size)
        name, made = f"{arguments.encoder} with random weights", torch.rand(arguments.studies, 1, *size)
        volumes = [lambda number=number: made[number : number + 1] for number in range(arguments.studies)]
    ways = {"literal": literal, "ours": ours}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way(model, tokenize, volumes[:1])  # warm-up
    for _ in range(arguments.runs):
        found = {}
        for way, compute in ways.items():
            started = time.perf_counter()
            found[way] = compute(model, tokenize, volumes)
            seconds[way].append(time.perf_counter() - started)
        difference = check_equal(found["literal"], found["ours"])
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    results: dict[str, Any] = {
        "model": name,
        "size": list(size),
        "studies": len(volumes),
        "runs": arguments.runs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        **{way: {"seconds": median} for way, median in medians.items()},
        "times": medians["literal"] / medians["ours"],
        "difference": difference,
    }
    write_json(arguments.output / "zero_shot.json", results)
    write_text(arguments.output / "zero_shot.md", table(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(run(main))
