"""All figures of one run of the CT-CLIP path in summary.json and report.md, from what stages/demo/ct_clip.sh left under a folder.

    python stages/demo/summary_ct_clip.py --root outputs/demo-ct-clip --name demo-ct-clip

Sets the figures that are expected of the run of that name beside those that were reached; it never fails because of one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from med3dvlm import evaluation
from med3dvlm.evaluation.targets import Targets, at, compare, target_table
from med3dvlm.files import read_lines, write_text
from med3dvlm.programs import Parser, run
from med3dvlm.prompts import RESEARCH_NOTICE
from med3dvlm.training.environment import environment

DEMO = "demo-ct-clip"
TARGETS: Targets = {
    "zero_shot.auroc": ("at least", {DEMO: 0.75}, 0.85),
    "zero_shot.auroc_permuted_labels": ("at most", {DEMO: 0.55}, 0.5),
    "linear_probe.auroc": ("at least", {DEMO: 0.82}, 0.92),
    "linear_probe.auroc_shuffled_labels": ("at most", {DEMO: 0.55}, 0.5),
    "retrieval.image_to_text.r10": ("at least", {DEMO: 0.5}, None),
    "retrieval.text_to_image.r10": ("at least", {}, None),
    "retrieval.image_to_image.map10": ("at least", {}, None),
    "seconds.total": ("at most", {DEMO: 1200}, 720),
    "peak_rss_gb": ("at most", {}, None),
}


def read(root: Path, name: str) -> Any:
    path = root / "eval" / name / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; write it with eval/{name}.py first")
    return json.loads(path.read_text(encoding="utf-8-sig"))


def collect(root: Path) -> dict[str, Any]:
    """Every figure under its name in summary.json."""
    zero_shot, probe, retrieval = (read(root, name) for name in ("zero_shot", "linear_probe", "retrieval"))
    pool = retrieval["pool_100"] if "pool_100" in retrieval else next(iter(retrieval.values()))
    timed = read_lines(root / "seconds.jsonl")
    seconds: dict[str, float] = {}
    for line in timed:  # a step that was interrupted has several
        seconds[line["step"]] = round(seconds.get(line["step"], 0.0) + line["seconds"], 1)
    return {
        "zero_shot": {
            "auroc": zero_shot["macro"]["auroc"],
            "interval": zero_shot["intervals"]["macro.auroc"],
            "auroc_permuted_labels": at(zero_shot, "permuted_labels.macro_auroc"),
        },
        "linear_probe": {
            "auroc": probe["macro"]["auroc"],
            "interval": probe["intervals"]["macro.auroc"],
            "auroc_shuffled_labels": at(probe, "shuffled_labels.macro_auroc"),
        },
        "retrieval": {name: pool.get(name) for name in ("image_to_text", "text_to_image", "image_to_image", "pool")},
        "seconds": seconds | {"total": round(sum(seconds.values()), 1) if seconds else None},
        "peak_rss_gb": max((line["peak_rss_gb"] for line in timed), default=None),
        **environment(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, type=Path, help="folder of the run, with eval/ in it")
    parser.add_argument("--name", default=DEMO, help="%(default)s (the default), or a name of which nothing is expected")
    arguments = parser.parse_args(argv)
    summary = collect(arguments.root)
    summary["reached"] = compare(summary, TARGETS, arguments.name)
    evaluation.write_scores(arguments.root / "summary.json", summary)
    targets = target_table(summary["reached"])
    minutes = evaluation.markdown_table(
        ("step", "minutes"), [(step, f"{value / 60:.1f}") for step, value in summary["seconds"].items() if value]
    )
    parts = [f"# {arguments.name}: results", f"*{RESEARCH_NOTICE}*", targets]
    for name, heading in (("zero_shot", "Zero-shot"), ("linear_probe", "Linear probe"), ("retrieval", "Retrieval")):
        parts += [f"## {heading}", (arguments.root / "eval" / name / "scores.md").read_text(encoding="utf-8-sig").strip()]
    write_text(arguments.root / "report.md", "\n\n".join([*parts, "## Time", minutes]) + "\n")
    print(targets)


if __name__ == "__main__":
    sys.exit(run(main))
