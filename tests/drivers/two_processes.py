"""python tests/drivers/two_processes.py FOLDER PORT STRATEGY: the toy training on 2 processes, uninterrupted, stopped and resumed."""

import json
import os
import sys
from pathlib import Path

import torch

from tests.training.toy import train


def process(rank: int, folder: Path, port: str, strategy: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    settings = {"per_device_train_batch_size": 2, "train_sampling_strategy": strategy}
    whole = train(folder / "whole", **settings)
    train(folder / "stopped", stop_after=7, **settings)
    again = train(folder / "stopped", **settings)
    weights = [model.linear.weight.tolist() for model in (whole, again)]
    (folder / f"{rank}.json").write_text(json.dumps({"whole": whole.seen, "again": again.seen, "weights": weights}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(process, (Path(sys.argv[1]), *sys.argv[2:]), 2, start_method="fork")
