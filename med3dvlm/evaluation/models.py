"""Models at work on prepared data.

Shapes: B volumes, L tokens, n image tokens of C channels, P the width of the space that images and texts share, V words of the vocabulary.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from med3dvlm.datasets.features import report_features
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.evaluation.cases import processes
from med3dvlm.inference.chat import Med3DChat
from med3dvlm.inference.out_of_distribution import Features
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import IGNORED, Med3DVLMProcessor, Message
from med3dvlm.records import Study
from med3dvlm.search import Embedder

CONVERSATIONS = 64  # most of them in a row


def empty_volume(data: PreparedData) -> Tensor:
    """Return a prepared volume (D, H, W) that holds the recipe's lowest value everywhere."""
    return torch.full(data.processor.size, data.processor.grid.values[0])


def load_chat(arguments: argparse.Namespace, data: PreparedData) -> Med3DChat:
    """Load a Med3DChat, and check that it takes volumes prepared as these are."""
    chat = Med3DChat.from_pretrained(arguments.model, arguments.device)
    same_preprocessing(chat.processor.image_processor, data)
    return chat


def load_embedder(path: str, data: PreparedData, device: str, max_text_length: int | None = None) -> Embedder:
    """Load a Med3DCLIP to embed prepared data.

    Raises:
        ValueError: the directory holds another kind of model, or one for data that was prepared otherwise.
    """
    embedder = Embedder(path, device, max_text_length)
    same_preprocessing(embedder.processor.image_processor, data)
    return embedder


def embed_volumes(embedder: Embedder, data: PreparedData, studies: Sequence[Study]) -> Tensor:
    """Return embeddings (B, P) of the volumes of B studies, float32 on the CPU, of length 1."""
    return embedder.volumes(load_volumes(data, studies, embedder.model.device))


@torch.no_grad()
def embed_reports(embedder: Embedder, data: PreparedData, split: str) -> Tensor:
    """Return embeddings (N, P) of the reports of all N studies of a split, float32 on the CPU, of length 1. The text encoder's part is kept
    beside the data, see `report_features`.
    """
    processes()  # which share the work know each other
    reports, model = [study.report for study in data.studies(split)], embedder.model
    pooled = report_features(data.folder / "features", model, embedder.processor, reports)
    return model.project_text(pooled.to(model.device, model.dtype)).float().cpu()


@torch.no_grad()
def answer_likelihoods(
    model: Med3DVLM, processor: Med3DVLMProcessor, conversations: Sequence[Sequence[Sequence[Message]]], features: Sequence[Features]
) -> list[list[float]]:
    """Return the mean log-probability of the assistant's words and turn end for each conversation about each of B volumes.

    Conversations about a volume share a row, up to CONVERSATIONS of them, so that what stands before the question is computed once (see
    Med3DVLMProcessor.branch); where the model cannot take that, each has a row of its own. The mean, not the sum: a long answer must not
    lose for its length.

    Args:
        conversations: for each volume one or more.
        features: for each volume what `Med3DVLM.encode_image` gives.
    """
    size = CONVERSATIONS if model.packing_obstacle is None else 1
    rows = [(place, about[start : start + size]) for place, about in enumerate(conversations) for start in range(0, len(about), size)]
    found: list[list[float]] = [[] for _ in conversations]
    for start in range(0, len(rows), len(conversations)):
        batch = rows[start : start + len(conversations)]
        values = _row_likelihoods(model, processor, [row for _, row in batch], [features[place] for place, _ in batch])
        for (place, _), row in zip(batch, values, strict=True):
            found[place] += row
    return found


def _row_likelihoods(
    model: Med3DVLM, processor: Med3DVLMProcessor, conversations: Sequence[Sequence[Sequence[Message]]], features: Sequence[Features]
) -> list[list[float]]:
    """Return `answer_likelihoods` for one row for each volume."""
    padded = processor.pad([processor.branch(row) for row in conversations], left=False)
    batch = {name: value.to(model.device) for name, value in padded.items()}
    low, high = (torch.cat(level) for level in zip(*features, strict=True))  # (B, n, C)
    branches, labels = batch["branches"], batch["labels"]  # (B, L)
    names = ("branches", "position_ids") if branches.max() > 1 else ("attention_mask",)
    placed = {name: batch[name] for name in names}
    output = model(batch["input_ids"], **placed, image_features=(low, high), labels=labels)
    labelled = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][labelled].unsqueeze(1)
    log_probabilities = output.logits.log_softmax(dim=-1).gather(1, targets).squeeze(1).double()  # (labelled, V) -> (labelled)
    places = (labelled.nonzero()[:, 0], branches[:, 1:][labelled] - 1)
    sums = log_probabilities.new_zeros(len(conversations), max(map(len, conversations)))
    counts = torch.zeros_like(sums)
    sums.index_put_(places, log_probabilities, accumulate=True)
    counts.index_put_(places, torch.ones_like(log_probabilities), accumulate=True)
    means = (sums / counts).tolist()
    return [values[: len(row)] for values, row in zip(means, conversations, strict=True)]
