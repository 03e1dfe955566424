"""Saliency: how much each cell of the encoder's grid contributes to a phrase, or to an answer.

    finder = PhraseSaliency.from_pretrained("outputs/demo/stage1")
    heat = finder.saliency("scan.nii.gz", "Pleural effusion.")                       # of a Med3DCLIP
    heat = answer_saliency(chat, "scan.nii.gz", "What is seen?", answer.text)       # of a Med3DChat
    overlay = place(heat, read_volume("scan.nii.gz"), finder.processor.image_processor)  # 0..1 in the scan's own voxels

Both use one formula: the difference of a cell's features from the scan's mean cell, times the gradient of the score with respect to them,
channel by channel, summed over the positive channels (Grad-CAM, arXiv 1610.02391, with the product of HiResCAM, arXiv 2011.08891, so that a
gradient counts where it is). Of the forms that were tried on phantoms (eval/saliency.py measures) this one found lesions as well as any and
followed the words more than the others did. It says what moved the model, which need not be where the finding is: read the measured shares
before an overlay is believed.

Shapes: d, h, w cells of the grid; D, H, W voxels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from med3dvlm.checkpoints import load_clip
from med3dvlm.encoders import HierarchicalEncoder, Size
from med3dvlm.inference.chat import Med3DChat
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.models.vlm_processor import IGNORED, Message
from med3dvlm.preprocessing import Scan, VolumeProcessor
from med3dvlm.volume import Volume

LEVEL = -2  # of the encoder's outputs: the low one of the two that a language model sees; finer ones found less
ONE_AT_A_TIME = Lock()  # a model is watched by a hook, which sees whoever runs it


@dataclass(frozen=True)
class SaliencyMap:
    """The contribution of each cell of a grid (d, h, w), as float32, at least 0; only differences within one scan mean something.

    `cells` is the 4x4 matrix that takes a cell's index to that of the voxel in its middle, in the volume that the processor made;
    `size` is that volume's (D, H, W).
    """

    values: NDArray[np.float32]
    cells: NDArray[np.float64]
    size: Size

    @property
    def peak(self) -> tuple[int, int, int]:
        """Return the index of the highest cell."""
        depth, height, width = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(depth), int(height), int(width)


class PhraseSaliency:
    """A Med3DCLIP that shows where a scan resembles a phrase. Its model is for prediction alone."""

    def __init__(self, model: Med3DCLIP, processor: Med3DCLIPProcessor) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> "PhraseSaliency":
        """Load a directory that stage 1 or `convert` wrote; by default onto the GPU where there is one.

        Raises:
            FileNotFoundError, ValueError: there is no model, or one of another kind.
        """
        model, processor = load_clip(path)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model.to(device), processor)  # type: ignore[arg-type]

    def saliency(self, scan: Scan, phrase: str, level: int = LEVEL) -> SaliencyMap:
        """Return each cell's contribution to the cosine of scan and phrase.

        Args:
            phrase: a sentence or a few words, such as "Pleural effusion."
            level: the encoder's output whose cells are shown, counted from its end.

        Raises:
            ValueError: the phrase is empty, or the scan unusable (VolumeError).
        """
        if not phrase.strip():
            raise ValueError("The phrase is empty; say what to look for.")
        inputs = self.processor(scan, phrase.strip()).to(self.model.device)
        with torch.no_grad():
            direction = self.model.encode_text(inputs["input_ids"], inputs["attention_mask"])[0]  # (P)
        pixels = inputs["pixel_values"].to(self.model.dtype)
        return weighted_features(self.model.vision_encoder, pixels, level, lambda: (self.model.encode_image(pixels) @ direction).sum())


def answer_saliency(
    chat: Med3DChat,
    scan: Scan,
    question: str,
    answer: str,
    history: Sequence[Message] | None = None,
    part: str | None = None,
    level: int = LEVEL,
) -> SaliencyMap:
    """Return each cell's contribution to the log probability of an answer, given the scan, the question and `history`.

    Args:
        part: some of the answer's own words, of which alone the probability is meant; all by default. Of a long report, give one sentence.
        level: as for `PhraseSaliency.saliency`.

    Raises:
        ValueError: question or answer is empty, the answer lacks the part, or the scan is unusable (VolumeError).
    """
    if not question.strip() or not answer.strip():
        raise ValueError("There is no answer to explain; ask a question first.")
    model = chat.model.requires_grad_(False)
    pixels = chat.processor.image_processor(scan)["pixel_values"].to(model.device, model.dtype)
    ids, labels = _labelled(chat, [*(history or []), {"role": "user", "content": question.strip()}], answer.strip(), part)

    def log_probability() -> Tensor:
        output = model(ids.to(model.device), pixel_values=pixels, labels=labels.to(model.device))
        return -output.loss * (labels != IGNORED).sum()

    return weighted_features(model.vision_encoder, pixels, level, log_probability)


def _labelled(chat: Med3DChat, messages: list[Message], answer: str, part: str | None) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `labels` (1, L) of a conversation, where only the answer's tokens, or those of a part of it, are labelled.

    The oldest turns go where the language model has no room for all, as they do when it answers.
    """
    context = getattr(chat.model.config.text_config, "max_position_embeddings", None) or float("inf")
    while True:
        before = len(chat.processor.encode(messages, generate=True)["input_ids"])
        coded = chat.processor.encode([*messages, {"role": "assistant", "content": answer}])
        turns = [place for place, message in enumerate(messages) if message["role"] == "user"]
        if len(coded["input_ids"]) <= context or len(turns) < 2:
            break
        del messages[turns[0] : turns[1]]
    labels = [label if place >= before else IGNORED for place, label in enumerate(coded["labels"])]
    if part is not None:
        answered = [label for label in labels if label != IGNORED]
        texts = [
            chat.processor.tokenizer.decode(answered[:count], clean_up_tokenization_spaces=False) for count in range(len(answered) + 1)
        ]
        start = texts[-1].find(part)
        if not part.strip() or start < 0:
            raise ValueError(f"The answer does not say {part!r}; give some of its own words.")
        ends = [len(text) for text in texts]  # the characters that the first tokens make
        first = labels.index(answered[0])
        meant = [ends[place + 1] > start and ends[place] < start + len(part) for place in range(len(answered))]
        labels = [IGNORED] * first + [label if each else IGNORED for label, each in zip(answered, meant, strict=True)]
        labels += [IGNORED] * (len(coded["labels"]) - len(labels))
    return torch.tensor([coded["input_ids"]]), torch.tensor([labels])


def weighted_features(encoder: Any, pixels: Tensor, level: int, score: Callable[[], Tensor]) -> SaliencyMap:
    """Return what the features of each cell of an encoder's output add to a score beyond the mean cell's: the sum over the channels of max(0,
    (feature - mean) * gradient).

    Args:
        pixels: (1, 1, D, H, W), what the encoder is given.
        level: the output, counted from the end. In an encoder without separate stages the gradient does not pass from a later output to it.
        score: runs the model, encoder included, and gives one number.

    Raises:
        ValueError: the encoder has no such output.
    """
    _, _, depth, height, width = pixels.shape
    size = (depth, height, width)
    grids = encoder.grids(size)
    if not -len(grids) <= level < 0:
        raise ValueError(f"level is {level}, but the encoder's outputs are -{len(grids)} to -1")
    watched: list[Tensor] = []

    def watch(features: Tensor) -> Tensor:
        """Start the gradient here: nothing before it is kept in memory."""
        watched.append(features.detach().requires_grad_())
        return watched[0]

    hierarchical = isinstance(encoder, HierarchicalEncoder)
    place = [encoder.stem, *encoder.stages][level] if hierarchical else encoder

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        if hierarchical:
            return watch(output)  # (1, d, h, w, C)
        return [watch(tokens) if number == len(output) + level else tokens for number, tokens in enumerate(output)]

    with ONE_AT_A_TIME:
        handle = place.register_forward_hook(hook)
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(score(), watched[0])
        finally:
            handle.remove()
    features = watched[0].detach().reshape(-1, gradient.shape[-1])  # (d*h*w, C)
    parts = (features - features.mean(dim=0)) * gradient.reshape(features.shape)
    first, step = encoder.centres(size)[level]
    cells = np.diag([*step, 1.0])
    cells[:3, 3] = first
    return SaliencyMap(parts.clamp_min(0).sum(dim=-1).float().reshape(grids[level]).cpu().numpy(), cells, size)


def place(heat: SaliencyMap, volume: Volume, processor: VolumeProcessor, step: int = 1) -> NDArray[np.float32]:
    """Resample the heat to the scan's own voxels, for display: 0 from the median cell down, 1 at the highest.

    Between the middles of the cells it is linear; what the model did not see, since it was cropped away, is 0.

    Args:
        processor: the one that prepared the scan for the model.
        step: gives every step-th voxel along D, H and W, from the first, which is enough for an overlay.

    Returns:
        float32 (D, H, W) of `volume.array`, each divided by `step` and rounded up.
    """
    low, high = float(np.median(heat.values)), float(heat.values.max())
    values = np.clip((heat.values - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat.values)
    placement = processor.placement(volume)
    axes = [int(np.flatnonzero(placement[axis, :3])[0]) for axis in range(3)]  # which of the grid's leads along D, H, W of the scan
    values = values.transpose(axes)
    for axis, (of_grid, length) in enumerate(zip(axes, volume.shape, strict=True)):
        voxels = (np.arange(0, length, step) - placement[axis, 3]) / placement[axis, of_grid]  # in what the processor made
        seen = (voxels >= -0.5) & (voxels <= heat.size[of_grid] - 0.5)
        cells = (voxels - heat.cells[of_grid, 3]) / heat.cells[of_grid, of_grid]
        values = np.moveaxis(_interpolated(np.moveaxis(values, axis, 0), cells, seen), 0, axis)
    return np.ascontiguousarray(values, dtype=np.float32)


def _interpolated(values: NDArray[Any], places: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[Any]:
    """Interpolate `values` (n, ...) at `places` (N) along the first axis: (N, ...), linear, constant beyond the ends, 0 where not `seen`."""
    places = np.clip(places, 0, len(values) - 1)
    below = np.minimum(places.astype(int), max(len(values) - 2, 0))
    share = (places - below).astype(np.float32)[:, None, None]
    result: NDArray[Any] = values[below] * (1 - share) + values[np.minimum(below + 1, len(values) - 1)] * share
    return result * seen[:, None, None]
