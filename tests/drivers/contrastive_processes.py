"""python tests/drivers/contrastive_processes.py FOLDER: the models of FOLDER, the batch spread over 4 processes; loss and gradients.

It is a separate program, so that the processes are forked before any thread is started.
"""

import sys
from pathlib import Path

import open_clip.loss  # noqa: F401  before the fork, so that it is imported once
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from med3dvlm import Med3DCLIP

PROCESSES = 4


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    batch = torch.load(folder / "batch.pt")
    for path in sorted(folder.glob("*/config.json")):
        model = DistributedDataParallel(Med3DCLIP.from_pretrained(path.parent).double().eval())
        loss = model(**{name: values.chunk(PROCESSES)[rank] for name, values in batch.items()}).loss
        loss.backward()
        distributed.all_reduce(loss.detach(), op=distributed.ReduceOp.SUM)
        if rank == 0:
            gradients = {name: parameter.grad for name, parameter in model.module.named_parameters() if parameter.grad is not None}
            torch.save({"loss": loss.detach() / PROCESSES, "gradients": gradients}, path.parent / "result.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(process, (Path(sys.argv[1]),), PROCESSES, start_method="fork")
