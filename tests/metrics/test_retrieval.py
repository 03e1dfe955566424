"""Recall, median rank and mean reciprocal rank against plain loops."""

import math
from statistics import mean, median

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from med3dvlm.metrics import retrieval
from med3dvlm.metrics.retrieval import rank_values, recall_curve, retrieval_ranks, retrieval_scores


def looped_ranks(queries: NDArray[np.float64], candidates: NDArray[np.float64]) -> list[int]:
    def cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
        product = sum(a * b for a, b in zip(first, second, strict=True))
        return product / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))

    ranks = []
    for i, query in enumerate(queries):
        own = cosine(query, candidates[i])
        better_or_tied = [j for j, other in enumerate(candidates) if j != i and cosine(query, other) >= own - 1e-9]
        ranks.append(1 + len(better_or_tied))
    return ranks


@pytest.fixture
def pairs() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return 37 noisy pairs of width 7; texts 3, 4 and 30 differ only in length, so they tie."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(37, 7))
    texts = images + generator.normal(size=(37, 7))
    texts[4], texts[30] = 2 * texts[3], 0.1 * texts[3]
    return images, texts


def test_scores_equal_plain_loops(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    images, texts = pairs
    scores = retrieval_scores(images, texts)
    for direction, ranks in (
        ("image_to_text", looped_ranks(images, texts)),
        ("text_to_image", looped_ranks(texts, images)),
    ):
        for k in (1, 5, 10):
            assert scores[direction][f"r{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / 37)
        assert scores[direction]["median_rank"] == median(ranks)
        assert scores[direction]["mrr"] == pytest.approx(mean(1 / rank for rank in ranks))
    assert scores["pool"] == 37
    assert scores["image_to_text"] != scores["text_to_image"]


def test_pool_takes_the_first_pairs(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    images, texts = pairs
    assert retrieval_scores(images, texts, pool=11) == retrieval_scores(images[:11], texts[:11])


def test_ties_have_the_worst_rank() -> None:
    same = np.full((5, 3), 0.1)
    assert retrieval_ranks(same, same)["image_to_text"].tolist() == [5] * 5
    assert retrieval_scores(same, same)["image_to_text"] == {"r1": 0, "r5": 1, "r10": 1, "median_rank": 5, "mrr": 0.2}
    assert retrieval_ranks(np.zeros((4, 2)), np.eye(4, 2))["image_to_text"].tolist() == [4] * 4  # an all-zero embedding finds nothing


def test_the_block_size_does_not_matter(pairs: tuple[NDArray[np.float64], NDArray[np.float64]], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [index // 2 for index in range(37)]
    whole = retrieval_scores(*pairs, groups=groups)
    for cells in (1, 37 * 5, 37 * 36):  # one row, five rows, all but one at a time
        monkeypatch.setattr(retrieval, "BLOCK", cells)
        assert retrieval_scores(*pairs, groups=groups) == whole


def test_any_of_equal_equals_plain_loops(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    images, texts = pairs
    groups = ["same" if index in (3, 4, 30) else "pair" if index in (7, 9) else f"study {index}" for index in range(37)]
    for name, queries, candidates in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        expected = []
        for i, query in enumerate(queries):
            likeness = [float(query @ other / np.linalg.norm(other)) for other in candidates]
            best = max(likeness[j] for j in range(37) if groups[j] == groups[i])
            expected.append(1 + sum(likeness[j] >= best - 1e-9 for j in range(37) if groups[j] != groups[i]))
        assert retrieval_ranks(images, texts, groups=groups)[name].tolist() == expected
    scores = retrieval_scores(images, texts, groups=groups)
    assert scores["any_of_equal"]["duplicated"] == 5
    for direction in ("image_to_text", "text_to_image"):
        assert scores[direction] == retrieval_scores(images, texts)[direction]  # the single-answer figure stands beside it
        assert scores["any_of_equal"][direction]["mrr"] >= scores[direction]["mrr"]
    # The three texts are one: as single answers they tie and come third at best, as equal ones they are one answer.
    assert retrieval_ranks(images, texts)["image_to_text"][[3, 4, 30]].min() >= 3


def test_equal_studies_outside_the_pool_do_not_help(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    groups = np.arange(37) % 11
    scores = retrieval_scores(*pairs, pool=11, groups=groups)
    assert scores["any_of_equal"]["duplicated"] == 0
    assert scores["any_of_equal"]["image_to_text"] == scores["image_to_text"]


def test_a_single_group_is_always_found() -> None:
    same = np.full((5, 3), 0.1)
    assert retrieval_scores(same, same, groups=[0] * 5)["any_of_equal"]["image_to_text"]["r1"] == 1
    assert retrieval_scores(same, same, groups=range(5))["any_of_equal"]["image_to_text"]["r1"] == 0


def test_values_of_the_queries_average_to_the_scores(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    ranks, scores = retrieval_ranks(*pairs), retrieval_scores(*pairs, ks=(1, 5, 50))
    for direction, values in ranks.items():
        means = {name: float(array.mean()) for name, array in rank_values(values, ks=(1, 5, 50)).items()}
        assert means == {name: value for name, value in scores[direction].items() if name != "median_rank"}
        assert means["r50"] == 1


def test_torch_in_any_precision_equals_numpy() -> None:
    images = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    texts = images.flip(1).requires_grad_()
    expected = retrieval_scores(images.numpy(), texts.detach().numpy())
    assert retrieval_scores(images, texts) == expected
    assert retrieval_scores(images.bfloat16(), texts.bfloat16())["pool"] == 9


def test_recall_curve(pairs: tuple[NDArray[np.float64], NDArray[np.float64]]) -> None:
    curve = recall_curve(*pairs)
    assert [k for k, _ in curve["image to text"]] == list(range(1, 38))
    recalls = [recall for _, recall in curve["text to image"]]
    assert recalls == sorted(recalls) and recalls[-1] == 1
    scores = retrieval_scores(*pairs)
    assert dict(curve["image to text"])[5] == scores["image_to_text"]["r5"]
    assert recall_curve(*pairs, ks=(1, 5))["text to image"][1] == (5, scores["text_to_image"]["r5"])


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) and text_embeddings \(4, 2\)"):
        retrieval_scores(np.ones((3, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="pool=5 with 3 pairs"):
        retrieval_scores(np.eye(3), np.eye(3), pool=5)
    with pytest.raises(ValueError, match="the first is row 1"):
        retrieval_scores(np.array([[1.0, 0], [np.nan, 1]]), np.eye(2))
    with pytest.raises(ValueError, match="3 pairs but 2 groups"):
        retrieval_scores(np.eye(3), np.eye(3), groups=[1, 2])
    with pytest.raises(ValueError, match=r"shape \(N, d\)"):
        retrieval_scores(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="1 or more"):
        retrieval_scores(np.eye(3), np.eye(3), ks=(0, 1))
