"""The out-of-distribution detector against its formula."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from med3dvlm.inference.out_of_distribution import fit_detector


def correlated(count: int, seed: int) -> torch.Tensor:
    """Return (count, 30) features with a few latent factors, noise, unequal scales and offsets."""
    mixing = np.random.default_rng(9).normal(size=(5, 30))
    random = np.random.default_rng(seed)
    values = random.normal(size=(count, 5)) @ mixing + 0.3 * random.normal(size=(count, 30))
    return torch.tensor(values * np.geomspace(1e-3, 1e2, 30) + np.arange(30), dtype=torch.float32)


def test_distances_against_their_formula() -> None:
    train, validation, other = (correlated(count, seed).double().numpy() for count, seed in ((200, 0), (70, 1), (8, 2)))
    fitted = fit_detector(torch.tensor(train), torch.tensor(validation), components=7)
    mean, scale = train.mean(0), train.std(0, ddof=1)
    eigenvalues, vectors = np.linalg.eigh(np.cov((train - mean) / scale, rowvar=False))  # ascending
    rest = eigenvalues[:-7].mean()
    inverse = np.linalg.inv(vectors[:, -7:] @ np.diag(eigenvalues[-7:] - rest) @ vectors[:, -7:].T + rest * np.eye(30))

    def expected(rows: np.ndarray) -> list[float]:
        return [mahalanobis((row - mean) / scale, np.zeros(30), inverse) / math.sqrt(30) for row in rows]

    np.testing.assert_allclose(fitted.distance(torch.tensor(other)).numpy(), expected(other), rtol=1e-9)
    assert float(fitted.limit) == pytest.approx(np.percentile(expected(validation), 99), rel=1e-9)
    assert 0.8 < fitted.distance(torch.tensor(train)).mean() < 1.2


def test_the_detector_separates_other_scans() -> None:
    fitted = fit_detector(correlated(400, 0), correlated(100, 1))
    assert len(fitted.components) == 29  # not 64: as many as there are channels, less one for the residual
    own = fitted.distance(correlated(1000, 2))
    assert (own > fitted.limit).double().mean() < 0.05
    shifted = correlated(100, 3) + 8 * fitted.scale
    shuffled = torch.stack([column[torch.randperm(100)] for column in correlated(100, 4).T], dim=1)  # usual values, unusual together
    for other_patients in (shifted, shuffled, torch.zeros(1, 30), torch.full((1, 30), torch.nan)):
        assert not (fitted.distance(other_patients) <= fitted.limit).any()


def test_the_detector_with_few_scans_and_dead_channels() -> None:
    train, validation = correlated(25, 0), correlated(3, 1)
    train[:, 4] = validation[:, 4] = 0.0
    fitted = fit_detector(train, validation)
    assert len(fitted.components) == 2
    assert fitted.distance(validation).isfinite().all() and (fitted.distance(validation) <= 1.01 * fitted.limit).all()
    with pytest.raises(ValueError, match="at least 20 training scans"):
        fit_detector(train[:19], validation)
    with pytest.raises(ValueError, match="a validation scan"):
        fit_detector(train, validation[:0])
    with pytest.raises(ValueError, match="fit it again"):
        fitted.distance(torch.zeros(1, 31))
