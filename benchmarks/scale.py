"""Compute what preparing and training on a million CTs takes, and simulate the loader of 64 nodes.

    python -m benchmarks.scale
    python -m benchmarks.scale --write docs/scale.md
    python -m benchmarks.scale --inputs mine.json

Everything comes from the numbers in benchmarks/scale.json, measured, published or assumed as it says there, and from what the paper's models
compute, counted on tensors without numbers. The tables of docs/scale.md are what this prints; --write puts them there.
"""

import argparse
import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale_simulation import fetch_seconds, simulate
from med3dvlm.files import write_text
from med3dvlm.programs import Parser, run
from med3dvlm.tables import markdown_table
from med3dvlm.training.arguments import CONFIGS
from med3dvlm.training.memory import peak_of_step
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.planned import STAGES, batch_of, build

INPUTS = Path(__file__).with_suffix(".json")
NAMES = {"stage1_siglip": "stage 1", "stage2_projector": "stage 2", "stage3_lora": "stage 3"}
MARK = "<!-- {name} -->\n"
Table = list[list[object]]


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each by itself, as if none were fused."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(returned.alias_info for returned in func._schema.returns):  # no view
            self.total += sum(one.numel() * one.element_size() for one in tree_leaves((args, result)) if isinstance(one, Tensor))
        return result


@cache
def work_of(stage: str, tokens: int) -> tuple[float, float]:
    """Count the floating-point operations and the bytes of memory traffic of a training step, for one volume of the paper's stage.

    Stages 2 and 3 read the features of the frozen encoder (`cache_features`).
    """
    config = str(CONFIGS / "paper" / f"{stage}.yaml")
    arguments = parse_arguments(STAGES[stage], ["--config", config, "--data", "x", "--deepspeed", "", "--use-cpu", "true"])
    asked = Namespace(size=(128, 256, 256), encoder=None, language_model=None, length=tokens)
    model: Any = build(arguments, asked).train()
    counts = []
    for rows in (2, 3):
        batch = batch_of(model, arguments, asked, rows)
        if stage != "stage1_siglip":
            with torch.no_grad(), torch.device("meta"):
                batch["image_features"] = model.encode_image(batch.pop("pixel_values"))
        with Traffic() as traffic, FlopCounterMode(display=False) as flops:
            peak_of_step(model, batch)
        counts.append((flops.get_total_flops(), traffic.total))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def seconds_of(inputs: dict[str, Any], stage: str, gpu: str) -> float:
    """Return the seconds that a GPU needs for one volume: the longer of computing and of moving bytes."""
    assumed, published = inputs["assumed"], inputs["published"][gpu]
    flops, moved = work_of(stage, assumed["report_tokens" if stage == "stage1_siglip" else "row_tokens"])
    computing = flops / published["bfloat16_teraflops"] / 1e12 / assumed["flops_share"]
    return float(max(computing, moved / published["terabytes_per_second"] / 1e12 / assumed["bandwidth_share"]))


def preparation(inputs: dict[str, Any]) -> Table:
    measured, scans = inputs["measured"], inputs["scans"]
    cores = inputs["nodes"] * inputs["cores_per_node"]
    rows: Table = [["recipe", "raw, TB", "prepared, TB", "CPU hours", f"hours on {cores:,} cores", "GB/s read meanwhile"]]
    for recipe, seconds in measured["prepare_cpu_seconds"].items():
        hours = scans * (seconds + measured["inflate_cpu_seconds"]) / 3600
        raw, prepared = (scans * size / 1e12 for size in (inputs["raw_megabytes"] * 1e6, measured["prepared_bytes"][recipe]))
        rows.append(
            [recipe, f"{raw:.0f}", f"{prepared:.1f}", f"{hours:,.0f}", f"{hours / cores:.2f}", f"{raw * 1e3 / 3600 / (hours / cores):.0f}"]
        )
    features = sum(tokens * width for tokens, width in inputs["counted"]["feature_shapes"]) * 2  # bytes of bfloat16
    hours = scans * measured["encode_core_seconds"] / 3600
    read = f"{scans * measured['prepared_bytes']['m3d'] / 1e9 / 3600 / (hours / cores):.0f}"
    rows.append(["features of the frozen encoder", "", f"{scans * features / 1e12:.2f}", f"{hours:,.0f}", f"{hours / cores:.2f}", read])
    return rows


def given(inputs: dict[str, Any]) -> Table:
    """List what everything is computed from."""
    rows: Table = [["number", "value"]]
    for name, value in inputs.items():
        if isinstance(value, dict):
            rows += [[f"{name}: {part}", json.dumps(one).replace('"', "") if isinstance(one, dict) else one] for part, one in value.items()]
        else:
            rows.append([name, value])
    return [[str(name).replace("_", " "), str(value).replace("_", " ").strip("{}")] for name, value in rows]


def training(inputs: dict[str, Any]) -> Table:
    gpus = inputs["nodes"] * inputs["gpus_per_node"]
    size = inputs["measured"]["prepared_bytes"]["m3d"]
    header = ["stage, epochs", "GFLOP a volume", "GPU", "ms a volume", "GPU hours", f"hours on {gpus} GPUs", "GB/s a node would read"]
    rows: Table = [list(header)]
    for stage, epochs in inputs["epochs"].items():
        first = stage == "stage1_siglip"
        flops, _ = work_of(stage, inputs["assumed"]["report_tokens" if first else "row_tokens"])
        for gpu in inputs["published"]:
            each = seconds_of(inputs, stage, gpu)
            hours = inputs["scans"] * epochs * each / 3600
            read = f"{inputs['gpus_per_node'] / each * size / 1e9:.1f}" if first else "features alone"
            rows.append(
                [f"{NAMES[stage]}, {epochs}", f"{flops / 1e9:,.0f}", gpu, f"{each * 1e3:.2f}", f"{hours:,.1f}", f"{hours / gpus:.2f}", read]
            )
    return rows


def limits(inputs: dict[str, Any]) -> Table:
    """List what bounds the volumes a second that a node of stage 1 reads."""
    measured = inputs["measured"]
    size, cores = measured["prepared_bytes"]["m3d"], inputs["cores_per_node"]
    connections = inputs["assumed"]["connections_per_process"] * inputs["gpus_per_node"]
    bounds = {
        f"GPUs ({gpu})": inputs["gpus_per_node"] / seconds_of(inputs, "stage1_siglip", gpu) for gpu in inputs["published"]
    } | {
        f"{cores} cores, volumes in the cache": cores / measured["read_cpu_seconds"]["m3d"],
        f"{cores} cores, volumes from an address": cores / (measured["read_cpu_seconds"]["m3d"] + measured["fetch_cpu_seconds"]["m3d"]),
        f"link of {inputs['link_gbit_per_second']} Gbit/s": inputs["link_gbit_per_second"] / 8 * 1e9 / size,
        f"{connections} connections to a store": connections / fetch_seconds(inputs),
        f"store of {inputs['store_gbyte_per_second']} GB/s, a node's share": inputs["store_gbyte_per_second"] * 1e9 / size / inputs["nodes"],
    }  # fmt: skip
    return [["bound", "volumes/s of a node"], *([name, f"{rate:,.0f}"] for name, rate in bounds.items())]


def loader(inputs: dict[str, Any]) -> Table:
    header = [
        "order of rows",
        "cache, share of the data",
        "rows fetched ahead",
        "of the GPUs' speed (A100)",
        "(H100)",
        "TB fetched an epoch",
    ]
    rows: Table = [list(header)]
    nodes = inputs["nodes"]
    for shards, share, ahead in ((False, 0.0, 0), (False, 0.0, 128), (False, 1 / nodes, 128), (False, 1.0, 128), (True, 1 / nodes, 128)):
        found = [simulate(inputs, seconds_of(inputs, "stage1_siglip", gpu), share, ahead, shards) for gpu in ("A100", "H100")]
        speeds = [f"{one['ideal'] / one['seconds']:.0%}" for one in found]
        name = "each node its own part (not built)" if shards else "the training's"
        rows.append([name, f"{share:.3g}", ahead, *speeds, f"{found[0]['fetched'] / 1e12:.1f}"])
    return rows


def tables(inputs: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield the tables of the page, by name."""
    for make in (given, preparation, training, limits, loader):
        yield make.__name__, make(inputs)


def markdown(table: Table) -> str:
    return markdown_table([str(cell) for cell in table[0]], table[1:]) + "\n"


def with_table(page: str, name: str, table: Table) -> str:
    """Replace the table that follows the mark of this name."""
    mark = MARK.format(name=name)
    if mark not in page:
        raise ValueError(f"the page has no line {mark.strip()}, where the table of that name belongs")
    before, after = page.split(mark)
    return before + mark + markdown(table) + re.sub(r"\A(\|.*\n)*", "", after)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, default=INPUTS, metavar="FILE", help="the numbers to compute from (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    arguments = parser.parse_args(argv)
    inputs = json.loads(arguments.inputs.read_text(encoding="utf-8-sig"))
    page = arguments.write.read_text(encoding="utf-8-sig") if arguments.write else ""
    for name, table in tables(inputs):
        print(f"\n{name}\n\n{markdown(table)}", flush=True)
        page = with_table(page, name, table) if page else page
    if arguments.write:
        write_text(arguments.write, page)


if __name__ == "__main__":
    sys.exit(run(main))
