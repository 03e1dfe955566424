"""`index`, `search`: find the cases of a data set that are like a scan, or like what a text says."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from med3dvlm.cli.options import SCANS, Commands, add_reading, quiet_transformers, reading
from med3dvlm.remote.cache import add_cache, cache_of

if TYPE_CHECKING:
    from med3dvlm.search import Hit


def add_commands(commands: Commands) -> None:
    index = commands.add_parser("index", help="embed the scans of prepared data into an index, for search")
    index.add_argument("model", metavar="MODEL", type=Path, help="the folder of a contrastive model, as stage 1 writes it")
    index.add_argument("data", metavar="DATA", help="the prepared data: a folder, or an address as s3://bucket/data")
    add_cache(index)
    index.add_argument("out", metavar="OUT", type=Path, help="the folder of the index; an interrupted command continues")
    index.add_argument("--split", help="index this split only (default: all)")
    index.add_argument(
        "--split-file", type=Path, metavar="JSON", help="the studies of each split, as audit writes them (default: the data's)"
    )
    index.add_argument("--exclude-failures", action="store_true", help="go on without studies that could not be prepared")
    index.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="scans in a batch: speed, not results (default: %(default)s)"
    )
    index.add_argument(
        "--engine", choices=("local", "ray"), default="local",
        help="local: this process; ray: the Ray cluster of RAY_ADDRESS or of this machine, a GPU a batch where it has any (default: %(default)s)",
    )  # fmt: skip
    index.set_defaults(run=_index)

    search = commands.add_parser("search", help="find the cases of an index nearest to a text or a scan, with their reports")
    search.add_argument("index", metavar="OUT", type=Path, help="the folder that index wrote")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="a finding, a question or a report")
    query.add_argument("--image", metavar="SCAN", help=f"a scan: {SCANS}")
    search.add_argument("--top", type=int, default=5, metavar="N", help="how many cases (default: %(default)s)")
    search.add_argument("--model", type=Path, help="folder of the index's model, where it was moved")
    search.add_argument("--exact", action="store_true", help="compare with every case; without it, search in a large index is approximate")
    add_reading(search)
    search.set_defaults(run=_search)


def _index(arguments: argparse.Namespace) -> None:
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.datasets.store import PreparedData
    from med3dvlm.prompts import RESEARCH_NOTICE
    from med3dvlm.search import CaseIndex

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size} but at least one scan is embedded at a time")
    keep_freed_memory()
    quiet_transformers()
    data = PreparedData(arguments.data, arguments.exclude_failures, arguments.split_file, cache_of(arguments))
    data.require_room(arguments.batch_size)
    index = CaseIndex.build(arguments.model, data, arguments.out, arguments.split, arguments.batch_size, engine=arguments.engine)
    print(f"{arguments.out} holds {len(index)} cases")
    print(RESEARCH_NOTICE, file=sys.stderr)


def _search(arguments: argparse.Namespace) -> None:
    from med3dvlm.allocator import keep_freed_memory
    from med3dvlm.prompts import RESEARCH_NOTICE
    from med3dvlm.search import CaseIndex
    from med3dvlm.volume import read_volume

    keep_freed_memory()
    quiet_transformers()
    index = CaseIndex(arguments.index, arguments.model)
    if arguments.image is None:
        hits = index.search_text([arguments.text], arguments.top, arguments.exact)[0]
    else:
        volume = read_volume(arguments.image, **reading(arguments))
        for warning in volume.warnings:
            print(f"Warning: {warning}", file=sys.stderr)
        hits = index.search_scan(volume, arguments.top, arguments.exact)
    _print_hits(hits)
    print("A similarity is a cosine, at most 1. It orders the cases and is not a probability.", RESEARCH_NOTICE, sep="\n", file=sys.stderr)


def _print_hits(hits: "Sequence[Hit]") -> None:
    for place, hit in enumerate(hits, start=1):
        print(f"{place}. similarity {hit.similarity:.4f}, {hit.id} ({hit.split})")
        if found := [name for name, value in hit.labels.items() if value == 1]:
            print(f"   Labels: {', '.join(found)}")
        print(textwrap.indent(hit.report.strip(), "   "))
