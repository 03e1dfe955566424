"""Compare bfloat16 with float32: the embeddings of a Med3DCLIP, and the ranks of each scan's report.

    python -m benchmarks.bfloat16 --model outputs/demo/stage1 --data outputs/demo/prepared --limit 50 --output outputs/demo/eval/precision

Writes scores.json: the least and the mean cosine between a volume's two embeddings, recall in both types, and how far ranks move.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from med3dvlm import evaluation
from med3dvlm.checkpoints import load_clip
from med3dvlm.datasets.store import same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.metrics.retrieval import retrieval_ranks, retrieval_scores
from med3dvlm.programs import run


def main(argv: Sequence[str] | None = None) -> None:
    parser = evaluation.evaluation_parser(__doc__)
    arguments = parser.parse_args(argv)
    data, studies = evaluation.open_data(arguments)
    model, processor = load_clip(arguments.model, dtype=torch.float32)
    same_preprocessing(processor.image_processor, data)
    model.to(arguments.device)

    @torch.no_grad()
    def embed(dtype: torch.dtype) -> Tensor:
        model.to(dtype)
        batches = tqdm(evaluation.in_batches(studies, arguments.batch_size), desc=str(dtype).removeprefix("torch."), unit="batch")
        volumes = (load_volumes(data, batch, model.device).to(dtype) for batch in batches)
        return torch.cat([model.encode_image(volume).cpu() for volume in volumes])  # (N, P)

    with torch.no_grad():
        reports = model.encode_text(**processor(text=[study.report for study in studies]).to(model.device)).cpu()
    full, half = embed(torch.float32), embed(torch.bfloat16)
    cosines = torch.nn.functional.cosine_similarity(full, half)
    moved = abs(retrieval_ranks(full, reports)["image_to_text"] - retrieval_ranks(half, reports)["image_to_text"])
    scores = {
        "studies": len(studies),
        "cosine": {"least": float(cosines.min()), "mean": float(cosines.mean())},
        "float32": retrieval_scores(full, reports),
        "bfloat16": retrieval_scores(half, reports),
        "ranks": {"unchanged": float((moved == 0).mean()), "largest_move": int(moved.max())},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    evaluation.write_scores(arguments.output / "scores.json", scores)
    print(f"{len(studies)} scans: cosine at least {scores['cosine']['least']:.5f}, mean {scores['cosine']['mean']:.5f};", end=" ")
    print(f"{scores['ranks']['unchanged']:.0%} of the ranks unchanged, the largest move {scores['ranks']['largest_move']}")
    rows = [[dtype, *(scores[dtype]["image_to_text"][name] for name in ("r1", "r5", "r10", "mrr"))] for dtype in ("float32", "bfloat16")]
    print(evaluation.markdown_table(("image to text", "r1", "r5", "r10", "mrr"), rows))


if __name__ == "__main__":
    sys.exit(run(main))
