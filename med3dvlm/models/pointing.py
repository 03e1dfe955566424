"""Pointing by a language model: the projected state of its pointing token is the query of a segmentation head (as in LISA, arXiv 2308.00692).

    hidden state of the last layer AT a pointing token -> projection -> query (P) -> SegmentationHead -> mask

The token has an embedding of its own, in and out, so that it can be learned while the language model is frozen or has LoRA.

Shapes: B volumes of D, H, W voxels; L tokens; N pointing tokens of all rows, K of a volume; E width of the language model; V its vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from med3dvlm.models.mask_losses import mask_losses
from med3dvlm.models.segmentation import (
    DECODER_SETTINGS,
    Med3DSegmenterOutput,
    build_head,
    query_projection,
    segment_from_queries,
)

POINTING_TOKEN = "<seg>"
SETTINGS = (*DECODER_SETTINGS, "segmentation_loss", "presence_weight")


def pointing_settings(segmenter_config: Any, pointing_token_id: int) -> dict[str, Any]:
    """Make the `segmentation_config` of a Med3DVLMConfig from a Med3DSegmenterConfig."""
    return {name: getattr(segmenter_config, name) for name in SETTINGS} | {"pointing_token_id": pointing_token_id}


class Pointing(nn.Module):
    """The part of a Med3DVLM that points: `head` draws masks, `projection` makes queries, `token` (2, E) is the token's input and output
    embedding.

    Args:
        encoder: the vision encoder whose stages the head reads; nothing of it is kept.
        width: E.
        settings: see `pointing_settings`.
    """

    def __init__(self, encoder: Any, width: int, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.token_id = int(settings["pointing_token_id"])
        self.settings = dict(settings)
        self.head = build_head(encoder, settings)
        self.projection = query_projection(width, settings["embedding_dim"])
        self.token = nn.Parameter(torch.zeros(2, width))

    @torch.no_grad()
    def initialise_token(self, language_model: Any) -> None:
        """Initialise the token by the mean of the language model's embeddings, so that no word is nearer than another."""
        for row, module in enumerate((language_model.get_input_embeddings(), language_model.get_output_embeddings())):
            self.token[row] = module.weight.float().mean(dim=0).to(self.token)

    def rows(self, language_model: Any) -> tuple[Tensor, Tensor]:
        """Return the token's input and output embedding, on the device of the language model's tables."""
        tied = language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight
        return self.token[0], self.token[0 if tied else 1]

    @torch.no_grad()
    def write_token(self, language_model: Any) -> None:
        """Write the token's embedding into the language model's tables, which `generate` uses."""
        modules = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        for module, row in zip(modules, self.rows(language_model), strict=True):
            module.weight[self.token_id] = row.to(module.weight)
            if getattr(module, "bias", None) is not None:
                module.bias[self.token_id] = 0

    def embed(self, input_ids: Tensor, embeds: Tensor, language_model: Any) -> Tensor:
        """Replace the embedding (B, L, E) of the token by its own."""
        row = self.rows(language_model)[0] * getattr(language_model.get_input_embeddings(), "embed_scale", 1.0)
        return torch.where((input_ids == self.token_id).unsqueeze(-1), row.to(embeds.dtype), embeds)

    def queries(self, hidden: Tensor) -> Tensor:
        """Project hidden states at pointing tokens, (..., E), to queries (..., P)."""
        projected: Tensor = self.projection(hidden.to(self.token.dtype))
        return projected

    def draw(self, encoder: Any, stages: Sequence[Tensor], queries: Tensor, pixel_values: Tensor) -> Med3DSegmenterOutput:
        """Draw masks for queries (B, K, P), as a Med3DSegmenter with this head does."""
        return segment_from_queries(self.head, encoder, stages, queries, pixel_values)

    def losses(
        self, encoder: Any, stages: Sequence[Tensor], pixel_values: Tensor, hidden: Sequence[Tensor], masks: Tensor, points: Tensor
    ) -> Tensor:
        """Return `mask_losses` of each volume, (B); 0 for one without a pointing token.

        Args:
            hidden: of each row the states at its pointing tokens, (K, E).
            masks: (B, G, D, H, W) bool.
            points: (B, K), for each pointing token in its order the number of the mask that it points to; -1 where a row has no more tokens.

        Raises:
            ValueError: a row has another number of pointing tokens than of points.
        """
        wanted = (points >= 0).sum(dim=1).tolist()
        if wanted != [len(states) for states in hidden]:
            raise ValueError(f"the rows have {[len(states) for states in hidden]} pointing tokens, but {wanted} masks are pointed to")
        queries = self.queries(torch.cat(list(hidden)))  # (N, P)
        losses = (0 * queries.float().sum()).repeat(len(points))  # in the graph whatever there is: all processes reduce the same gradients
        trains = any(parameter.requires_grad for parameter in self.head.parameters())
        if not (len(queries) or trains):
            return losses
        depth, height, width = pixel_values.shape[2:]
        cells, whole = self.head.features(stages, encoder.grids((depth, height, width)), pixel_values)
        found = []
        for row, own in enumerate(queries.split(wanted)):  # one by one: K differs, and logits have the volume's size
            asked = torch.ones(1, max(len(own), 1), dtype=torch.bool, device=own.device)
            drawn = masks[row, points[row, : len(own)]].unsqueeze(0)
            if not len(own):
                if not trains:
                    found.append(losses[row])
                    continue
                own, asked, drawn = own.new_zeros(1, own.shape[1]), ~asked, drawn.new_zeros(1, 1, depth, height, width)
            logits, presence = self.head.compare(cells[row : row + 1], whole[row : row + 1], own.unsqueeze(0), (depth, height, width))
            loss = mask_losses(logits, presence, drawn, asked, self.settings["segmentation_loss"], self.settings["presence_weight"])
            found.append(loss.squeeze(0))
        return losses + torch.stack(found)
