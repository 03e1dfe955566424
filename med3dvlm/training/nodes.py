"""A training on several nodes: what has to be the same on each, and checkpoints where the nodes share no disk.

Checkpoints, records and the model are written by the first process alone, on the disk of its node. When a training continues, nodes that do
not see the newest checkpoint get a copy of it from one that does.
"""

import json
import logging
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from med3dvlm.datasets.store import PreparedData
from med3dvlm.processes import gathered, rank_and_count, require_all, send_files, sharing, together
from med3dvlm.training.environment import code_fingerprint, versions

if TYPE_CHECKING:
    from med3dvlm.training.arguments import StageArguments

logger = logging.getLogger(__name__)

COMPLETE = "complete"  # the file that says a checkpoint was written to its end
RECORDS = ("identity.json", "losses.jsonl", "validation_losses.jsonl")  # beside the checkpoints, that belong to them
# Settings that may differ between nodes: places, whose content is compared, and what a machine can do.
LOCAL = {
    "data", "data_cache", "data_cache_size", "output_dir", "split_file", "merged", "clip", "model", "language_model", "text_encoder",
    "segmenter", "deepspeed", "logging_dir", "run_name", "local_rank", "dataloader_num_workers", "dataloader_prefetch_factor",
    "dataloader_pin_memory",
}  # fmt: skip


def require_same(values: Mapping[str, Mapping[str, object]]) -> None:
    """End all processes where one has another value than the first.

    Args:
        values: what to do about a difference -> name -> value.
    """
    reports = gathered((socket.gethostname(), {remedy: dict(group) for remedy, group in values.items()}))
    first, ours = reports[0]
    for rank, (node, theirs) in enumerate(reports):
        for remedy, group in ours.items():
            for name in (*group, *theirs[remedy]):
                if (here := group.get(name)) != (there := theirs[remedy].get(name)):
                    require_all(f"{name} is {there!s:.100} on node {node} (process {rank}), but {here!s:.100} on node {first}; {remedy}")
                    return


def require_same_start(arguments: "StageArguments", data: PreparedData) -> None:
    """End all processes where versions, code, settings or prepared data of a node are not those of the first, or volumes are missing."""
    settings = arguments.to_dict()
    compared: dict[str, Any] = {field.name: settings[field.name] for field in fields(arguments) if field.name in settings.keys() - LOCAL}
    if isinstance(arguments.deepspeed, str) and arguments.deepspeed:
        compared["DeepSpeed's configuration"] = json.loads(Path(arguments.deepspeed).read_text(encoding="utf-8-sig"))
    require_same({
        "install the same versions on every node": {"version of " + name: number for name, number in versions().items()},
        "install the same med3dvlm on every node": {"the fingerprint of med3dvlm's code": code_fingerprint()},
        "pass the same settings on every node": compared,
        "copy the prepared data whole to every node": {"the fingerprint of the prepared data": data.summary["fingerprint"]},
    })  # fmt: skip
    if rank_and_count()[1] > 1:
        together(data.require_volumes if os.environ.get("LOCAL_RANK", "0") == "0" else bool)


class SharedOutput:
    """The output folder of a training, as its nodes see it.

    Args:
        writes: whether this process writes checkpoints (`should_save`).
    """

    def __init__(self, root: Path, writes: bool) -> None:
        self.root, self.writes = root, writes
        self.rank, _ = rank_and_count()
        self.neighbours = sharing(root)
        writers = [number for number, one in enumerate(gathered(writes)) if one]
        own = [number for number in writers if number in self.neighbours]
        several = "save_on_each_node is true, but nodes share the disk of output_dir, and would write the same files; leave it out"
        require_all(several if len(own) > 1 else None)
        self.written = bool(own)  # whether the node that this process runs on sees what is written
        self.copies: list[Path] = []
        nodes = gathered((socket.gethostname(), self.written))
        if lacking := sorted({node for node, written in nodes if not written}):
            logger.warning(
                "%s does not lie on a disk that all nodes share: checkpoints and model are written on node %s alone, and %s would get copies when "
                "the training continues",
                root, nodes[0][0], ", ".join(lacking),
            )  # fmt: skip

    def clean(self) -> None:
        """Delete checkpoints that were not written to their end."""
        if self.rank == self.neighbours[0]:
            for folder in self.checkpoints():
                if not (folder / COMPLETE).is_file():
                    logger.warning("deleting %s, an incomplete checkpoint", folder)
                    shutil.rmtree(folder)

    def checkpoints(self) -> list[Path]:
        return [folder for folder in self.root.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdecimal()]

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint of any node, on the disk of each."""
        own = max((int(folder.name.rpartition("-")[2]) for folder in self.checkpoints()), default=-1)
        known = gathered(own)
        return self.brought(f"checkpoint-{max(known)}") if max(known) >= 0 else None

    def brought(self, name: str) -> Path:
        """Copy a checkpoint to the nodes that lack it; those that do not write keep the copy until the next step."""
        folder = self.root / name
        owners = gathered((folder / COMPLETE).is_file())
        if not all(owners):
            source = owners.index(True)
            files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (path.name == COMPLETE, path))
            receives = not owners[self.rank] and self.rank == self.neighbours[0]
            send_files(self.root, [record for record in RECORDS if (self.root / record).is_file()], source, receives and self.written)
            send_files(self.root, [str(path.relative_to(self.root)) for path in files], source, receives)
            gathered(None)  # the copies are whole
            if receives and not self.written:
                self.copies.append(folder)
        return folder

    def drop_copies(self) -> None:
        """Delete copies from nodes that write nothing, which would grow old there."""
        while self.copies:
            shutil.rmtree(self.copies.pop())


class CopyRemover(TrainerCallback):
    """Drops copies of a checkpoint when the first step from it begins."""

    def __init__(self, output: SharedOutput) -> None:
        self.output = output

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.output.drop_copies()
