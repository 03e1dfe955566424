"""What the scripts of eval/ share: arguments and records of a run, predictions on disk, models at work, and scores of answers and reports."""

from med3dvlm.evaluation.cases import in_batches, is_first, predict, predictions
from med3dvlm.evaluation.models import Embedder, answer_likelihoods, empty_volume, exchange, load_chat
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
    "Embedder",
    "empty_volume",
    "answer_likelihoods",
    "begin",
    "evaluation_parser",
    "in_batches",
    "is_first",
    "load_chat",
    "markdown_table",
    "open_data",
    "predict",
    "predictions",
    "other_patients",
    "training_split",
    "exchange",
    "with_interval",
    "write_scores",
]
