"""Retrieval of a Med3DCLIP: which report belongs to a volume, and which volume to a report.

    python eval/retrieval.py --model outputs/demo/stage1 --data outputs/demo/prepared --output outputs/demo/eval/retrieval
    python eval/retrieval.py --data outputs/demo/prepared --output outputs/demo/eval/retrieval --score_only

Every study is embedded once, to embeddings.safetensors. A pool is the first 100, 500, 1000 or 2000 studies of the split, as far as it has
that many, or all of a smaller split. predictions.jsonl has the rank of each one's partner among the whole split, from 1.
"""

import torch
from safetensors.torch import load_file, save_file

from med3dvlm import evaluation
from med3dvlm.checkpoints import load_clip, model_type
from med3dvlm.datasets.store import same_preprocessing
from med3dvlm.datasets.torch import PairCollator
from med3dvlm.files import read_lines, write_lines
from med3dvlm.metrics.retrieval import partner_ranks, retrieval_scores
from med3dvlm.preprocessing import dequantize
from med3dvlm.records import Study

POOLS = (100, 500, 1000, 2000)


def main() -> None:
    parser = evaluation.evaluation_parser(__doc__)
    parser.add_argument("--max_text_length", type=evaluation.positive, help="tokens of a report (default: what the text encoder takes)")
    arguments = parser.parse_args()
    data, studies = evaluation.open_data(arguments)
    ids = [study.id for study in studies]
    predicted, embedded = arguments.output / "predictions.jsonl", arguments.output / "embeddings.safetensors"
    growing = arguments.output / "embeddings.jsonl"  # line by line, so that a killed run continues

    if not arguments.score_only:
        if (kind := model_type(arguments.model)) != "med3d_clip":
            raise ValueError(f"{arguments.model} holds a {kind} model, which embeds nothing; name the output of stages/stage1_siglip.py")
        model, tokenizer, processor = load_clip(arguments.model)
        same_preprocessing(processor, data)
        model.to(arguments.device)
        longest = min(tokenizer.model_max_length, getattr(model.text_encoder.config, "max_position_embeddings", tokenizer.model_max_length))
        collator = PairCollator(tokenizer, min(arguments.max_text_length or longest, longest))
        evaluation.begin(arguments, model, data, max_text_length=collator.max_length)

        @torch.no_grad()
        def embed(batch: list[Study]) -> list[dict]:
            volumes = dequantize(torch.stack([data.volume(study) for study in batch])).to(model.device, model.dtype)
            texts = collator.tokenize([study.report for study in batch]).items()
            images = model.encode_image(volumes).float().tolist()
            reports = model.encode_text(**{name: value.to(model.device) for name, value in texts}).float().tolist()
            return [{"id": study.id, "image": image, "text": text} for study, image, text in zip(batch, images, reports, strict=True)]

        if not embedded.is_file():
            evaluation.predict(growing, evaluation.in_batches(studies, arguments.batch_size), embed, lambda study: study.id)
            rows = read_lines(growing)
            aside = embedded.with_suffix(".part")
            save_file({name: torch.tensor([row[name] for row in rows]) for name in ("image", "text")}, aside)
            aside.replace(embedded)
        growing.unlink(missing_ok=True)
        stored = load_file(embedded)
        to_text, to_image = partner_ranks(stored["image"], stored["text"]), partner_ranks(stored["text"], stored["image"])
        ranks = zip(ids, to_text.tolist(), to_image.tolist(), strict=True)
        write_lines(predicted, [{"id": name, "image_to_text": text, "text_to_image": image} for name, text, image in ranks])

    evaluation.predictions(predicted, ids)  # makes sure that they are about these studies
    stored = load_file(embedded)  # (N, P) each
    pools = [pool for pool in POOLS if pool <= len(studies)] or [len(studies)]
    scores = {f"pool_{pool}": retrieval_scores(stored["image"], stored["text"], pool=pool) for pool in pools}
    evaluation.write_scores(arguments.output / "scores.json", scores)
    directions = ("image_to_text", "text_to_image")
    names = ("r1", "r5", "r10", "median_rank", "mrr")
    rows = [[pool, way.replace("_", " "), *(scores[pool][way][name] for name in names)] for pool in scores for way in directions]
    print(evaluation.markdown_table(("pool", "direction", *names), rows))


if __name__ == "__main__":
    evaluation.script(main)
