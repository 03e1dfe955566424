"""Evaluate zero-shot detection of findings by a Med3DCLIP.

    med3dvlm evaluate zero_shot --model outputs/ct_clip/model --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/zero_shot
    med3dvlm evaluate zero_shot --data outputs/ct_clip/prepared --split valid --output outputs/ct_clip/eval/zero_shot --score-only
    torchrun --nproc_per_node 2 -m med3dvlm.cli evaluate zero_shot --model ... --templates 4

The findings are those that the studies have labels of: CT-RATE's 18, and any others by the same prompts.

The published protocol: softmax over the similarities of a volume to "{Pathology} is present." and "{Pathology} is not present.". Here the
model's own temperature multiplies them; whether it did in the published figures, the papers do not say. That is the sigmoid of temperature
times the difference, so each volume is encoded once and each prompt once; the literal way encodes the volume with each of the pairs
(`python -m benchmarks.zero_shot`). The temperature changes neither AUROC nor what is above 0.5. With --templates, the embeddings of several
prompts are averaged (prompts.py).

Volumes are encoded one by one: predictions are the same bytes for every batch size and number of processes.

    published         the figures of the DCFormer paper, of CT-CLIP and of VLM3D, each by its definition (med3dvlm/metrics/classification.py)
    blind             the scores of an empty volume, which is all air, given to every study
    shuffled          what it says of the next patient's volume
    everything        every finding stated of every study: DCFormer's F1 of that is far from 0
    permuted_labels   the macro AUROC against labels permuted among the patients

Thresholds never come from what is scored, see --threshold-split. med3dvlm/evaluation/detection.py says what is written.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch

from med3dvlm import evaluation
from med3dvlm.evaluation import detection, paper_tables
from med3dvlm.files import write_lines
from med3dvlm.programs import positive
from med3dvlm.prompts import FINDING_PROMPTS
from med3dvlm.records import Study
from med3dvlm.search.embedding import prompt_directions


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument(
        "--templates",
        type=positive,
        default=1,
        help=f"prompt pairs averaged, 1 to {len(FINDING_PROMPTS)}; 1 is the published one",
    )
    detection.add_threshold_arguments(parser)
    parser.add_argument("--data-name", default="this data", help="what the data is called beside the papers (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.templates > len(FINDING_PROMPTS):
        raise ValueError(f"--templates {arguments.templates}: there are {len(FINDING_PROMPTS)} pairs of prompts in med3dvlm/prompts.py")
    data, studies = evaluation.open_data(arguments)
    detection.require_labels(data, arguments.split, studies)
    names = detection.names_of(studies)
    others, threshold_source = detection.threshold_studies(data, arguments.split, studies, arguments.threshold_split)
    paths = {arguments.output / detection.PREDICTIONS: studies, arguments.output / detection.OF_THRESHOLDS: others}

    def about(study: Study) -> dict[str, Any]:
        return {"id": study.id}

    if not arguments.score_only:
        embedder = evaluation.load_embedder(arguments.model, data, arguments.device)
        facts = detection.encoder_facts(embedder.model.vision_encoder, embedder.model.config.encoder, data.processor.size)
        evaluation.begin(arguments, embedder.model, data, templates=arguments.templates, encoder=facts, findings=names)
        directions = prompt_directions(embedder, names, arguments.templates)

        def detect(batch: Sequence[Study]) -> list[dict[str, Any]]:
            embedded = ((study.id, evaluation.embed_volumes(embedder, data, [study])[0].double()) for study in batch)
            return [detection.row(name, names, (directions @ volume).tolist()) for name, volume in embedded]

        if not all(
            [
                evaluation.predict(path, evaluation.in_batches(part, arguments.batch_size), detect, about)
                for path, part in paths.items()
                if part
            ]
        ):
            return
        with torch.no_grad():
            empty = evaluation.empty_volume(data)[None, None].to(embedder.model.device, embedder.model.dtype)  # (1, 1, D, H, W)
            scores = directions @ embedder.model.encode_image(empty).double().cpu()[0]
        write_lines(arguments.output / detection.BLIND, [detection.row("air", names, scores.tolist())])

    record = json.loads((arguments.output / "run.json").read_text(encoding="utf-8-sig"))["identity"]
    found = detection.Detection.read(arguments.output, names, studies, others, threshold_source)
    facts = {"encoder": record["encoder"], "templates": record["templates"]}
    print(detection.report(arguments.output, "zero_shot", found, arguments.threshold_rule, facts))
    print(paper_tables.write_beside(arguments.output, arguments.data_name))
