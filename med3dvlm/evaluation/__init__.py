"""The programs of `med3dvlm evaluate` and what they share: arguments and records of a run, predictions on disk, models at work, scores of
answers and reports.
"""

from med3dvlm.evaluation.cases import in_batches, is_first, predict, predictions
from med3dvlm.evaluation.models import answer_likelihoods, embed_reports, embed_volumes, empty_volume, load_chat, load_embedder
from med3dvlm.evaluation.runs import (
    begin,
    evaluation_parser,
    open_data,
    other_patients,
    training_split,
    write_scores,
)
from med3dvlm.tables import markdown_table, with_interval

__all__ = [
    "answer_likelihoods",
    "begin",
    "embed_reports",
    "embed_volumes",
    "empty_volume",
    "evaluation_parser",
    "in_batches",
    "is_first",
    "load_chat",
    "load_embedder",
    "markdown_table",
    "open_data",
    "other_patients",
    "predict",
    "predictions",
    "training_split",
    "with_interval",
    "write_scores",
]
