"""Measure what batches of rows of like length save in stage 3: `train_sampling_strategy: group_by_length`, beside the plain random order.

    python -m benchmarks.grouping outputs/demo/stage2 --data outputs/demo/prepared

Forward and backward pass of the language model on the conversations of an epoch, with the demo's settings; image features are random, of the model's
shapes. Batches of one and the other order take turns, and the ratio of their sums is given; over a whole epoch both show the same rows.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from med3dvlm.checkpoints import load_vlm
from med3dvlm.datasets.conversations import ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.datasets.store import PreparedData
from med3dvlm.programs import Parser, positive, run
from med3dvlm.training.trainer import WholeBatches


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="output of stage 2")
    parser.add_argument("--data", required=True, help="prepared data")
    parser.add_argument("--batch", type=positive, default=12, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=positive, default=64, help="of each order (default: %(default)s)")
    arguments = parser.parse_args(argv)
    model, processor = load_vlm(arguments.model, dtype=torch.float32)
    model.vision_encoder.requires_grad_(False)
    model.train()
    with torch.no_grad():
        image = model.encode_image(torch.zeros(1, 1, *model.config.size))

    def features(study: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(level.shape[1:]) for level in image)

    options = ConversationOptions(yes_no=True, reports=0.4, closed=0.1, follow_ups=0.1)
    rows = ConversationDataset(PreparedData(arguments.data), "train", options, features=features)
    collate = ConversationCollator(processor, max_length=512)
    count = min(arguments.batches, len(rows) // arguments.batch)
    orders = {
        name: list(WholeBatches(len(rows), arguments.batch, 0, True, lengths))
        for name, lengths in (("random", None), ("grouped", rows.lengths))
    }
    seconds, places, words = (dict.fromkeys(orders, 0.0) for _ in range(3))
    for number in range(-1, count):  # the first warms up
        for name, order in orders.items():
            first = max(number, 0) * arguments.batch
            batch = collate([rows[row] for row in order[first : first + arguments.batch]])
            started = time.perf_counter()
            model.zero_grad()
            model(**batch).loss.backward()
            if number >= 0:
                seconds[name] += time.perf_counter() - started
                places[name] += batch["input_ids"].numel()
                words[name] += float(batch["attention_mask"].sum())
    print(f"{'order':10}{'batches':>10}{'padding':>10}{'seconds a batch':>18}")
    for name in orders:
        print(f"{name:10}{count:10}{1 - words[name] / places[name]:10.2f}{seconds[name] / count:18.4f}")
    print(f"random takes {seconds['random'] / seconds['grouped']:.2f} times as long; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    sys.exit(run(main))
