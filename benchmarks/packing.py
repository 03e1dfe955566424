"""Measure what packing saves: all conversations about a volume in one row, compared with a row for each.

    python benchmarks/packing.py
    python benchmarks/packing.py --image-tokens 64 --questions 12 --batch 4

Training steps of a small Qwen2 on random words in the proportions of M3D: a report and some questions about every volume, one of them asked
again with its choices. Both kinds of rows hold the same conversations, so loss and gradient are equal; steps of one and the other take
turns, and the median of each is given. The volume's features are there already: what the encoder saves, which runs once instead of once a
conversation, comes on top.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from transformers import Qwen2Config

from med3dvlm import Med3DVLM, Med3DVLMConfig
from med3dvlm.models.vlm_processor import IGNORED
from med3dvlm.programs import Parser, run

IMAGE_TOKEN = 1000


def build(arguments: argparse.Namespace) -> Med3DVLM:
    """A Med3DVLM whose projector gives the wanted number of image tokens, with the projector to train."""
    size = (64, 64, 64 * arguments.image_tokens)  # mlp: a token for each of the last stage's, 64 voxels apart
    text_config = Qwen2Config(
        vocab_size=1000, hidden_size=arguments.width, intermediate_size=arguments.width * 11 // 4, num_hidden_layers=arguments.layers,
        num_attention_heads=8, num_key_value_heads=4, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    config = Med3DVLMConfig(
        "dcformer_nano", {"widths": [4, 4, 8, 8, 16]}, size, projector="mlp", text_config=text_config,
        image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    model = Med3DVLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("projector."))
    return model.train()


def row_of(asked: Sequence[tuple[list[int], list[int]]], image_tokens: int) -> dict[str, list[int]]:
    """Conversations, each (question, answer), about one volume as one row (see Med3DVLMProcessor.branch)."""
    row = {"input_ids": [1, *[IMAGE_TOKEN] * image_tokens], "labels": [IGNORED] * (image_tokens + 1)}
    row |= {"position_ids": list(range(image_tokens + 1)), "branches": [0] * (image_tokens + 1)}
    for number, (question, answer) in enumerate(asked, start=1):
        row["input_ids"] += question + answer
        row["labels"] += [IGNORED] * len(question) + answer
        row["position_ids"] += range(image_tokens + 1, image_tokens + 1 + len(question) + len(answer))
        row["branches"] += [number] * (len(question) + len(answer))
    return row


def batch_of(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows, padded on the right, as Med3DVLM.forward takes them."""
    fillers = {"input_ids": 0, "labels": IGNORED, "position_ids": 0, "branches": -1}
    length = max(len(row["labels"]) for row in rows)
    batch = {key: torch.tensor([row[key] + [filler] * (length - len(row[key])) for row in rows]) for key, filler in fillers.items()}
    batch["attention_mask"] = (batch["branches"] >= 0).long()
    if batch["branches"].max() <= 1:
        del batch["branches"], batch["position_ids"]
    return batch


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-tokens", type=int, default=256, help="of a volume; the paper has 256 (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=5, help="about a volume (default: %(default)s)")
    parser.add_argument("--report", type=int, default=200, help="tokens of a report (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="volumes a step (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the language model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the language model (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each kind (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    model = build(arguments)

    def words(count: int) -> list[int]:
        return torch.randint(2, 1000, (count,)).tolist()

    lengths = [(12, arguments.report), *[(20, 5)] * arguments.questions, (45, 7)]
    volumes = [[(words(question), words(answer)) for question, answer in lengths] for _ in range(arguments.batch)]
    kinds = {
        "study": [row_of(asked, arguments.image_tokens) for asked in volumes],
        "conversation": [row_of([one], arguments.image_tokens) for asked in volumes for one in asked],
    }
    low, high = (torch.rand(arguments.batch, tokens, width) for tokens, width in zip((8, arguments.image_tokens), (8, 16), strict=True))
    conversations = arguments.batch * len(lengths)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    losses = {}
    for repeat in range(arguments.repeats + 1):
        for kind, rows in kinds.items():
            each = len(rows) // arguments.batch
            features = (low.repeat_interleave(each, dim=0), high.repeat_interleave(each, dim=0))
            model.zero_grad()
            started = time.perf_counter()
            loss = model(**batch_of(rows), image_features=features).loss
            loss.backward()
            losses[kind] = loss.item()
            if repeat:  # the first warms up
                seconds[kind].append(time.perf_counter() - started)
    print(f"{'rows':14}{'image tokens':>14}{'tokens':>10}{'seconds a conversation':>24}{'loss':>9}")
    for kind, rows in kinds.items():
        image, median = len(rows) * arguments.image_tokens, statistics.median(seconds[kind])
        print(f"{kind:14}{image:14,}{sum(len(row['labels']) for row in rows):10,}{median / conversations:24.4f}{losses[kind]:9.4f}")
    ratio = statistics.median(one / other for one, other in zip(seconds["conversation"], seconds["study"], strict=True))
    print(f"one conversation a row takes {ratio:.2f} times as long; medians of {arguments.repeats}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(run(main))
