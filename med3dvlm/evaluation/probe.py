"""A linear layer on a frozen encoder's pooled features: one logit a finding, trained by binary cross-entropy.

Stored as `probe.safetensors` (weight, bias, on the features as they leave the encoder) and `probe.json`, which says of what.

Shapes: N studies, F features, K findings. Labels are (N, K) of 0, 1 and NaN, unknown.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from med3dvlm.checkpoints import load_clip, load_encoder, load_vlm, model_type
from med3dvlm.datasets.features import fingerprint, frozen_features
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.encoders import Encoder
from med3dvlm.evaluation.cases import in_batches, processes, wait_for_all
from med3dvlm.files import atomic_file, checksum, write_json
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.records import Study

WEIGHTS_FILE, SETTINGS_FILE = "probe.safetensors", "probe.json"
CHUNK = 256  # studies whose features are lost where a run is killed, at most
ROUND = 10  # steps of L-BFGS between two looks at the validation studies
ROUNDS = 100
PATIENCE = 5  # rounds without a lower validation loss
DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)


class FrozenEncoder:
    """The image encoder of any model directory, in evaluation mode, at work on prepared data.

    `name` is the encoder's; `stages` how many of its last stages are pooled: as many as a Med3DCLIP pools, else one.

    Raises:
        ValueError: the directory holds another kind of model, or one for data that was prepared otherwise.
    """

    def __init__(self, path: str, data: PreparedData, device: str) -> None:
        self.data, self.stages = data, 1
        if (kind := model_type(path)) == "med3d_clip":
            clip, pairs = load_clip(path)
            self.encoder: Encoder = clip.vision_encoder
            processor = pairs.image_processor
            self.name, self.stages = clip.config.encoder, clip.config.image_stages
        elif kind == "med3dvlm":
            vlm, words = load_vlm(path)
            self.encoder, self.name, processor = vlm.vision_encoder, vlm.config.encoder, words.image_processor
        elif kind == "med3d_encoder":
            self.encoder, processor = load_encoder(path), VolumeProcessor.from_pretrained(path)
            self.name = json.loads((Path(path) / "config.json").read_text(encoding="utf-8-sig"))["encoder"]
        else:
            raise ValueError(
                f"{path} holds a {kind} model, which has no image encoder; name a Med3DCLIP, a Med3DVLM or a converted encoder"
            )
        same_preprocessing(processor, data)
        self.encoder.to(device).requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def pooled(self, volumes: Tensor) -> Tensor:
        """Return (B, F) float32 on the CPU for (B, 1, D, H, W): the mean token of each of the last stages, joined."""
        return torch.cat([tokens.float().mean(dim=1) for tokens in self.encoder(volumes.to(self.device))[-self.stages :]], dim=-1).cpu()

    def features(self, studies: Sequence[Study], cache: Path, description: str) -> Tensor:
        """Return (N, F) for studies. `cache` keeps what was computed: CHUNK studies a file, named after encoder and volumes.

        Volumes are computed one by one, so that the features are the same for every batch size. Several processes share the chunks.
        """
        made_by = fingerprint(self.encoder, str(self.stages))
        chunks = [(f"{made_by}_{checksum(','.join(map(self.data.checksum, part)).encode())}", part) for part in in_batches(studies, CHUNK)]
        rank, count = processes()

        def read(name: str, part: Sequence[Study]) -> Tensor:
            def compute(places: range) -> list[Tensor]:
                return [self.pooled(load_volumes(self.data, [part[place] for place in places], self.device))]

            return frozen_features(cache / f"{name}.safetensors", len(part), compute, batch_size=1, description=description)[0]

        for name, part in chunks[rank::count]:
            read(name, part)
        wait_for_all()
        return torch.cat([read(name, part) for name, part in chunks])


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe, made by `fit` or `load`; `names` are the findings of its K outputs."""

    names: tuple[str, ...]
    weight: Tensor  # (K, F) float64
    bias: Tensor  # (K,)

    def log_odds(self, features: Tensor) -> NDArray[np.float64]:
        """Return log-odds (N, K) of features (N, F)."""
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"the probe takes {self.weight.shape[1]} features, but the encoder gives {features.shape[1]}; train it on this one"
            )
        return (features.double() @ self.weight.T + self.bias).numpy()

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        with atomic_file(folder / WEIGHTS_FILE) as aside:
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, aside)
        write_json(folder / SETTINGS_FILE, {"names": self.names, **about})

    @classmethod
    def load(cls, folder: Path) -> tuple["LinearProbe", dict[str, Any]]:
        """Read what `save` wrote. Returns the probe and `about`.

        Raises:
            FileNotFoundError, ValueError: there is no probe, or its two files do not belong together.
        """
        for name in (WEIGHTS_FILE, SETTINGS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; name the output of a run of `med3dvlm evaluate linear_probe` that trained"
                )
        about = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8-sig"))
        names, stored = tuple(about.pop("names")), load_file(folder / WEIGHTS_FILE)
        if stored.keys() != {"weight", "bias"} or not len(names) == len(stored["weight"]) == len(stored["bias"]):
            raise ValueError(f"{folder / WEIGHTS_FILE} and {SETTINGS_FILE} do not belong together; train the probe anew")
        return cls(names, stored["weight"], stored["bias"]), about


def _learnable(train: Tensor, validation: Tensor) -> list[int]:
    """Return the findings that vary in the training labels (N, K) and have validation labels (M, K)."""
    both = ((train == 0).any(dim=0) & (train == 1).any(dim=0) & ~validation.isnan().all(dim=0)).nonzero()[:, 0].tolist()
    if not both:
        raise ValueError(
            "no finding is both present and absent in the training studies and known in the validation ones; there is nothing to learn"
        )
    return [int(index) for index in both]


def fit(
    names: Sequence[str],
    features: tuple[Tensor, Tensor],
    labels: tuple[NDArray[np.float64], NDArray[np.float64]],
    decays: Sequence[float] = DECAYS,
    balanced: bool = True,
) -> tuple[LinearProbe, dict[str, Any]]:
    """Train a probe; weight decay and number of rounds are those of the lowest loss on the validation studies.

    The loss is the sum over findings of the mean cross-entropy over the studies that have the label, plus decay / 2 times the squared
    weights on standardised features: for each finding scikit-learn's LogisticRegression with C = 1 / (decay x studies). It is minimised by
    L-BFGS over all studies at once, from zero; nothing is drawn, so there is no seed. Training with a decay ends when PATIENCE rounds
    have not lowered the validation loss.

    Args:
        features, labels: of the training and the validation studies.
        balanced: let present and absent weigh alike in each finding's mean; the weights are those of the training studies.

    Returns:
        The probe, with the findings that some training studies have and some have not and that validation has labels of, and
        `{"decay", "rounds", "validation_loss", "tried": [...]}`.

    Raises:
        ValueError: there is no such finding.
    """
    train, validation = (torch.from_numpy(np.asarray(table)).double() for table in labels)
    usable = _learnable(train, validation)
    train, validation = train[:, usable], validation[:, usable]
    mean, spread = features[0].double().mean(dim=0), features[0].double().std(dim=0, correction=0)
    spread = torch.where(spread == 0, 1.0, spread)
    inputs = [(part.double() - mean) / spread for part in features]
    share = torch.nanmean(train, dim=0)
    balance = (0.5 / share, 0.5 / (1 - share)) if balanced else (torch.ones_like(share), torch.ones_like(share))

    def loss(weight: Tensor, bias: Tensor, part: int) -> Tensor:
        truth = (train, validation)[part]
        known = ~truth.isnan()
        filled = truth.nan_to_num()
        weights = torch.where(filled == 1, *balance) * known / known.sum(dim=0)
        return binary_cross_entropy_with_logits(inputs[part] @ weight.T + bias, filled, weights, reduction="sum")

    tried: list[dict[str, float]] = []
    best: tuple[float, Tensor, Tensor] | None = None
    for decay in decays:
        weight = torch.zeros(len(usable), inputs[0].shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(len(usable), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=ROUND, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-12
        )

        def closure(
            weight: Tensor = weight, bias: Tensor = bias, decay: float = decay, optimizer: torch.optim.Optimizer = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            value = loss(weight, bias, 0) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        lowest, lowest_round = float("inf"), 0
        for number in range(1, ROUNDS + 1):
            before = weight.detach().clone()
            optimizer.step(closure)
            with torch.no_grad():
                value = float(loss(weight, bias, 1))
            if value < lowest:
                lowest, lowest_round = value, number
                if best is None or value < best[0]:
                    best = value, weight.detach().clone(), bias.detach().clone()
            if number - lowest_round >= PATIENCE or torch.equal(before, weight.detach()):
                break
        tried.append({"decay": decay, "rounds": lowest_round, "validation_loss": lowest / len(usable)})
    assert best is not None
    chosen = min(tried, key=lambda entry: entry["validation_loss"])
    weight = best[1] / spread
    return LinearProbe(tuple(names[index] for index in usable), weight, best[2] - weight @ mean), {**chosen, "tried": tried}
