"""Out-of-distribution detection: does a scan resemble the training scans?

It notices another body part, another modality, noise. It does not notice a mirrored or upside-down scan of the kind that it knows.

Shapes: n tokens and C width of one of the encoder's last two stages; F = C_low + C_high; N, M numbers of scans.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from med3dvlm.files import DETECTOR_FILE, atomic_file

Features = tuple[Tensor, Tensor]  # (1, n_low, C_low) and (1, n_high, C_high)

LIMIT_QUANTILE = 0.99


@dataclass(frozen=True)
class OutOfDistributionScore:
    """The distance of a scan from the training data (usually about 1), the limit, and a sentence if the distance exceeds it."""

    distance: float
    limit: float
    message: str | None


@dataclass(frozen=True)
class OutOfDistributionDetector:
    """The distribution of the training scans' pooled features: a Gaussian with a variance for each of the first K principal components and
    one for all other directions, the covariance of probabilistic PCA (Tipping and Bishop 1999).

    `mean`, `scale` (F,); `components` (K, F), orthonormal rows; `variances` (K,); `rest`, `limit` ().
    """

    mean: Tensor
    scale: Tensor
    components: Tensor
    variances: Tensor
    rest: Tensor
    limit: Tensor

    def distance(self, features: Tensor) -> Tensor:
        """Return the Mahalanobis distance (N,) of features (N, F), divided by sqrt(F) so that a training scan has about 1."""
        if features.shape[-1] != len(self.mean):
            raise ValueError(f"{features.shape[-1]} features were given but the detector was fitted on {len(self.mean)}; fit it again")
        centred = (features.double().cpu() - self.mean) / self.scale
        inside = centred @ self.components.T  # (N, K)
        residual = centred - inside @ self.components
        squared = (inside.square() / self.variances).sum(-1) + residual.square().sum(-1) / self.rest
        return (squared / len(self.mean)).sqrt()

    def save(self, directory: str | Path) -> None:
        """Write `out_of_distribution.safetensors` into a model directory, whole or not at all."""
        with atomic_file(Path(directory) / DETECTOR_FILE) as aside:
            save_file({name: value.contiguous() for name, value in vars(self).items()}, aside)

    @classmethod
    def load(cls, directory: str | Path) -> "OutOfDistributionDetector | None":
        """Read what `save` wrote, or return None where there is nothing."""
        path = Path(directory) / DETECTOR_FILE
        return cls(**load_file(path)) if path.is_file() else None


def fit_detector(train_features: Tensor, validation_features: Tensor, components: int = 64) -> OutOfDistributionDetector:
    """Fit on the training scans' features (N, F); the limit is the 99th percentile of the distance on validation scans' (M, F).

    The validation scans must be held out from the encoder's training: what it has seen lies closer than it should. So about 1 % of scans of
    the training kind are called out of distribution. At most N / 10 components are kept, each of which then rests on ten scans.

    Raises:
        ValueError: fewer than 20 training scans or no validation scan.
    """
    if len(train_features) < 20 or not len(validation_features):
        raise ValueError(
            f"the detector needs at least 20 training scans and a validation scan, not {len(train_features)} and {len(validation_features)}"
        )
    train = train_features.double().cpu()
    mean, scale = train.mean(0), train.std(0)
    scale = scale.clamp_min(1e-6 * scale.max())  # a channel that never changes must not divide by nothing
    _, singular, directions = torch.linalg.svd((train - mean) / scale, full_matrices=False)
    variances = singular.square() / (len(train) - 1)
    kept = min(components, len(train) // 10, train.shape[1] - 1)
    rest = variances[kept:].sum() / (train.shape[1] - kept)
    floor = 1e-4 * variances.sum() / train.shape[1]
    unlimited = torch.tensor(torch.inf, dtype=torch.float64)
    fitted = OutOfDistributionDetector(mean, scale, directions[:kept], variances[:kept].clamp_min(floor), rest.clamp_min(floor), unlimited)
    return replace(fitted, limit=torch.quantile(fitted.distance(validation_features), LIMIT_QUANTILE))


def pool_features(features: Features) -> Tensor:
    """Return the mean over the tokens of both stages, joined: (B, n_low, C_low), (B, n_high, C_high) -> (B, F), which `fit_detector` takes."""
    return torch.cat([level.float().mean(1) for level in features], dim=1)
