"""Train a linear probe on a frozen image encoder for CT-RATE's 18 findings (DCFormer paper, Table 2), or for whichever the data have labels
of.

    med3dvlm evaluate linear_probe --model outputs/ct_clip/model --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/probe
    med3dvlm evaluate linear_probe --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/probe --score-only
    med3dvlm evaluate linear_probe --model outputs/ct_clip/model --data other/prepared --output other/probe --probe outputs/ct_clip/eval/probe

Takes the image encoder of a Med3DCLIP, a Med3DVLM, or alone. Its tokens' mean is computed once for each volume and kept in the cache, the layer
is trained on those by binary cross-entropy (med3dvlm/evaluation/probe.py), and stopped early. Weight decay, the end of training and thresholds
come from the same studies, never from those that are scored, see --threshold-split. With --balanced, present and absent weigh alike, as the
papers' recall suggests; probabilities are then those of a world where every second study has the finding. The trained layer stays beside the
scores, and --probe takes it to other data. Rows as in zero_shot.py, and besides

    shuffled_labels   macro AUROC of probes trained in the same way on labels that were shuffled among the patients
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from med3dvlm import evaluation
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.store import PreparedData
from med3dvlm.evaluation import detection, paper_tables
from med3dvlm.evaluation.probe import DECAYS, FrozenEncoder, LinearProbe, fit
from med3dvlm.files import read_lines, write_json, write_lines
from med3dvlm.metrics.detection import macro_auroc, permuted
from med3dvlm.programs import add_flag
from med3dvlm.records import Study


def numbers(text: str) -> list[float]:
    """Parse "0.1,0.01" to [0.1, 0.01], for argparse."""
    return [float(part) for part in text.split(",")]


def training_studies(arguments: argparse.Namespace, data: PreparedData, others: Sequence[Study]) -> list[Study]:
    """Return the studies of the training split without the patients that thresholds are chosen on.

    Raises:
        ValueError: there is no training split, none is left, it has patients of the scored split, or no labels.
    """
    split = arguments.train_split or evaluation.training_split(data, arguments.split)
    if split is None:
        raise ValueError(
            f"{data.root} has no split to learn from besides {arguments.split!r}; it has {data.summary['splits']}; name one by --train-split"
        )
    known = {study.patient for study in data.studies(arguments.split)}
    apart = {study.patient for study in others}
    studies = [study for study in data.studies(split) if study.patient not in apart]
    if common := sorted({study.patient for study in studies} & known):
        raise ValueError(
            f"{len(common)} patients of split {arguments.split!r} are in {split!r}, too, but a probe must not learn from what is scored; "
            "name another --train-split, or split the patients again"
        )
    if not studies:
        raise ValueError(f"no study of split {split!r} is left to learn from; name another --threshold-split")
    detection.require_labels(data, split, studies)
    return studies


def trained(
    arguments: argparse.Namespace, parts: tuple[Sequence[Study], Sequence[Study]], features: tuple[Tensor, Tensor]
) -> tuple[LinearProbe, list[LinearProbe], dict[str, Any]]:
    """Train the probe and those of shuffled labels. Returns both and how they were found; `parts` are the studies for training and for
    validation.
    """
    names = detection.names_of(parts[0])
    first, second = (detection.label_table(part, names) for part in parts)
    labels = (first, second)
    probe, found = fit(names, features, labels, arguments.decays, arguments.balanced)
    controls = []
    for seed in range(arguments.controls):
        first, second = (table[permuted([study.patient for study in part], seed)] for table, part in zip(labels, parts, strict=True))
        controls.append(fit(names, features, (first, second), [found["decay"]], arguments.balanced)[0])
    return probe, controls, found


def write_predictions(path: Path, studies: Sequence[Study], features: Tensor, probe: LinearProbe, controls: Sequence[LinearProbe]) -> None:
    """Write a line a study; "control" has the log-odds of each probe of shuffled labels."""
    probes = (probe, *controls)
    lines = []
    for study, *values in zip(studies, *(one.log_odds(features) for one in probes), strict=True):
        own, *others = (detection.row(study.id, one.names, found) for one, found in zip(probes, values, strict=True))
        lines.append(own | {"control": [other["log_odds"] for other in others]})
    write_lines(path, lines)


def shuffled_labels(rows: Sequence[dict[str, Any]], studies: Sequence[Study], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the macro AUROC of the probes that learned shuffled labels, against the true ones."""
    if not rows[0]["control"]:
        return None
    labels = detection.label_table(studies, names)
    tables = [detection.log_odds_table((row["control"][number] for row in rows), names) for number in range(len(rows[0]["control"]))]
    areas = [macro_auroc(np.where(np.isnan(table), np.nan, labels), table) for table in tables]
    return {"probes": len(areas), "macro_auroc": float(np.mean(areas)), "each": areas}


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--train-split", help="split to learn from (default: the first whose name begins with train)")
    detection.add_threshold_arguments(parser)
    parser.add_argument(
        "--decays", type=numbers, default=list(DECAYS), help="weight decays to choose from, as 0.1,0.01 (default: %(default)s)"
    )
    add_flag(parser, "balanced", True, "let present and absent weigh alike in training")
    parser.add_argument("--controls", type=int, default=5, help="probes trained on shuffled labels (default: %(default)s)")
    parser.add_argument("--cache", type=Path, help="folder of the features, which several runs may share (default: OUTPUT/features)")
    parser.add_argument("--probe", type=Path, help="output of a run whose probe is used instead of training one")
    parser.add_argument("--data-name", default="this data", help="what the data is called beside the papers (default: %(default)s)")
    arguments = parser.parse_args(argv)
    started, output = time.perf_counter(), arguments.output
    data, studies = evaluation.open_data(arguments)
    detection.require_labels(data, arguments.split, studies)
    names = detection.names_of(studies)
    others, threshold_source = detection.threshold_studies(data, arguments.split, studies, arguments.threshold_split)
    parts = {output / detection.OF_THRESHOLDS: others, output / detection.PREDICTIONS: studies}
    parts = {path: part for path, part in parts.items() if part}

    if not arguments.score_only:
        if not (others or arguments.probe):
            raise ValueError(
                f"there are no labelled studies of other patients to stop the training by ({threshold_source}); name a --threshold-split"
            )
        train = [] if arguments.probe else training_studies(arguments, data, others)
        encoder = FrozenEncoder(arguments.model, data, arguments.device)
        facts = detection.encoder_facts(encoder.encoder, encoder.name, data.processor.size)
        settings = {"decays": arguments.decays, "balanced": arguments.balanced, "controls": arguments.controls, "train": len(train)}
        if arguments.probe:
            probe, found = LinearProbe.load(arguments.probe)
            if found["encoder"] != fingerprint(encoder.encoder):
                raise ValueError(f"{arguments.probe} holds a probe of another encoder than that of {arguments.model}; train one for it")
            settings = {"probe": found}
        learned = probe.names if arguments.probe else detection.names_of(train)
        if not set(learned) & set(names):
            raise ValueError(
                f"the probe is to learn {', '.join(learned)}, and split {arguments.split!r} has labels of {', '.join(names)}; "
                "give both splits labels of the same findings"
            )
        evaluation.begin(arguments, encoder.encoder, data, encoder=facts, thresholds=threshold_source, **settings)
        cache = arguments.cache or output / "features"
        features = {path: encoder.features(part, cache, path.stem) for path, part in parts.items()}
        learned_from = None if arguments.probe else encoder.features(train, cache, "train")
        if not evaluation.is_first():
            return
        controls: list[LinearProbe] = []
        if learned_from is not None:
            pooled = (learned_from, features[output / detection.OF_THRESHOLDS])
            probe, controls, training = trained(arguments, (train, others), pooled)
            probe.save(output, {"encoder": fingerprint(encoder.encoder), "stages": encoder.stages, "training": training})
        empty = encoder.pooled(evaluation.empty_volume(data)[None, None])
        write_lines(output / detection.BLIND, [detection.row("air", probe.names, probe.log_odds(empty)[0])])
        for path, part in parts.items():
            write_predictions(path, part, features[path], probe, controls)
        record = json.loads((output / "run.json").read_text(encoding="utf-8-sig"))
        write_json(output / "run.json", record | {"seconds": round(record["seconds"] + time.perf_counter() - started, 1)})

    detected = detection.Detection.read(output, names, studies, others, threshold_source)
    record = json.loads((output / "run.json").read_text(encoding="utf-8-sig"))["identity"]
    control = shuffled_labels(read_lines(output / detection.PREDICTIONS), studies, names)
    remark = [f"Macro AUROC of {control['probes']} probes trained on shuffled labels: {control['macro_auroc']:.3f}."] if control else []
    facts = {"encoder": record["encoder"], "shuffled_labels": control}
    print(detection.report(output, "linear_probe", detected, arguments.threshold_rule, facts, remark))
    print(paper_tables.write_beside(output, arguments.data_name))
