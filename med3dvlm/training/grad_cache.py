"""Gradients of a whole batch of pairs in the memory of a part of it (GradCache, arXiv 2101.06983).

A contrastive loss needs the embeddings of all pairs, but of what lies before them only what one pair made. A first pass computes all embeddings and
keeps nothing else; from them follow the loss and its gradients with respect to the embeddings, which a second pass carries on into the weights,
part by part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPOutput

Batch = dict[str, Tensor]


def backward_in_parts(
    clip: Med3DCLIP,
    parts: Sequence[Batch],
    embed: Callable[[Batch], Med3DCLIPOutput],
    backward: Callable[[int, Callable[[], Tensor]], None],
) -> Tensor:
    """Accumulate in the weights the gradients of the loss of all parts together; returns that loss.

    Dropout draws the same in both passes. Batch norm has the statistics of a part, and follows each once.

    Args:
        parts: see `split_pairs`.
        embed: the clip's output, without a loss, for a part, perhaps by what an engine made of it.
        backward: (number of a part, what computes a number) -> computes it and lets the weights have its gradients.
    """
    device = next(clip.parameters()).device
    statistics = {name: buffer.clone() for name, buffer in clip.named_buffers()}
    states: list[Any] = []
    images: list[Any] = []
    texts: list[Any] = []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state(device))
            output = embed(part)
            images.append(output.image_embeds)
            texts.append(_by_volume(output))
        for name, buffer in clip.named_buffers():
            buffer.copy_(statistics[name])
    scales = [scale for scale in (clip.logit_scale, clip.logit_bias) if scale.requires_grad]
    image, text = torch.cat(images).requires_grad_(), torch.cat(texts, dim=1).requires_grad_()  # (B, P), (k, B, P)
    with torch.enable_grad():
        loss = torch.stack([clip.contrast(image, one) for one in text]).mean()
    of_image, of_text, *of_scales = torch.autograd.grad(loss, [image, text, *scales])
    sizes = [len(one) for one in images]
    shares = list(zip(of_image.split(sizes), of_text.split(sizes, dim=1), strict=True))

    def passed_on(number: int) -> Tensor:
        """Return a number whose gradient is the loss's, of one part; the last part has that of the temperature too."""
        _set_random_state(states[number], device)
        output = embed(parts[number])
        total = (output.image_embeds * shares[number][0]).sum() + (_by_volume(output) * shares[number][1]).sum()
        return total + sum((scale * gradient).sum() for scale, gradient in zip(scales, of_scales, strict=True) if number == len(parts) - 1)

    for number in range(len(parts)):
        backward(number, lambda number=number: passed_on(number))  # type: ignore[misc]
    return loss.detach()


def split_pairs(batch: Batch, size: int) -> list[Batch]:
    """Split a batch of B volumes with k texts each (all first ones before all second ones) into similar parts of at most `size` volumes."""
    volumes = len(batch["pixel_values"])
    parts = torch.arange(volumes).tensor_split(-(-volumes // size))
    bounds = [(int(part[0]), int(part[-1]) + 1) for part in parts]
    return [
        {name: value.unflatten(0, (-1, volumes))[:, start:stop].flatten(0, 1) for name, value in batch.items()} for start, stop in bounds
    ]


def _by_volume(output: Med3DCLIPOutput) -> Any:
    """Return the embeddings of the first, the second and further texts, (k, B, P)."""
    assert output.image_embeds is not None and output.text_embeds is not None
    return output.text_embeds.unflatten(0, (-1, len(output.image_embeds)))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
