"""Med3DSegmenter: masks in a scan for what is asked in words (or by a language model's query), of any encoder with stages.

A Med3DCLIP reads volume and prompt; the prompt's embedding, projected, is compared with the embedding of every voxel.

Shapes: B volumes of D, H, W voxels; K prompts a volume; L text tokens; P width of queries and of voxel embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from med3dvlm.encoders.base import compute_type
from med3dvlm.encoders.layers import LayerNorm, Linear, widened
from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.models.mask_losses import SEGMENTATION_LOSSES, balanced_mean, held_by_cells, mask_losses, prompt_mean
from med3dvlm.models.portable import Carried, Portable, auto_map
from med3dvlm.models.segmentation_head import SegmentationHead, no_autocast
from med3dvlm.preprocessing import VolumeProcessor

NO_PROMPT = -1e4  # logits where a volume has fewer prompts than others of its batch
DECODER_SETTINGS = (
    "decoder_widths", "embedding_dim", "embedding_stride", "dual_cross_attention", "attention_level", "attention_heads",
)  # fmt: skip


class Med3DSegmenterConfig(Carried, PretrainedConfig):
    """Settings of a Med3DSegmenter.

    Args:
        clip_config: of the Med3DCLIP that reads volumes and prompts.
        decoder_widths: channels of the decoder for the stem and every stage of the encoder but the last; None takes the encoder's.
        embedding_dim: P, the width in which voxels and queries are compared.
        embedding_stride: voxels that one embedding spans along an axis: 1 for every voxel; it divides the stem's stride.
        dual_cross_attention: whether skip connections attend to each other.
        attention_level: the encoder's output (0 is the stem) whose grid they attend on.
        attention_heads: of their spatial attention.
        segmentation_loss: "dice_balanced_ce", "dice_ce" or "dice_focal", see `mask_losses`.
        presence_weight: of the loss of presence beside that of masks.
        token_levels: outputs of the encoder, -1 the last, whose tokens learn too whether what a prompt says lies in their cell (deep
            supervision); they are what a language model reads.
        token_weight: of their loss beside that of masks.
    """

    model_type = "med3d_segmenter"
    has_no_defaults_at_init = True
    sub_configs = {"clip_config": Med3DCLIPConfig}

    def __init__(
        self,
        clip_config: dict[str, Any] | Med3DCLIPConfig | None = None,
        decoder_widths: Sequence[int] | None = None,
        embedding_dim: int = 64,
        embedding_stride: int = 1,
        dual_cross_attention: bool = True,
        attention_level: int = 2,
        attention_heads: int = 4,
        segmentation_loss: str = "dice_balanced_ce",
        presence_weight: float = 0.1,
        token_levels: Sequence[int] = (),
        token_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if segmentation_loss not in SEGMENTATION_LOSSES:
            raise ValueError(f"segmentation_loss {segmentation_loss!r} is unknown; known: {', '.join(SEGMENTATION_LOSSES)}")
        self.clip_config = Med3DCLIPConfig(**clip_config) if isinstance(clip_config, dict) else clip_config
        self.decoder_widths = None if decoder_widths is None else list(decoder_widths)
        self.embedding_dim = embedding_dim
        self.embedding_stride = embedding_stride
        self.dual_cross_attention = dual_cross_attention
        self.attention_level = attention_level
        self.attention_heads = attention_heads
        self.segmentation_loss = segmentation_loss
        self.presence_weight = presence_weight
        self.token_levels = list(token_levels)
        self.token_weight = token_weight
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = {}  # None would unset that of a text encoder which is there already
        super().__init__(**kwargs)
        self.auto_map = auto_map(AutoConfig="Med3DSegmenterConfig", AutoModel="Med3DSegmenter")

    @property
    def longest_text(self) -> int | None:
        """As that of its Med3DCLIPConfig."""
        return None if self.clip_config is None else self.clip_config.longest_text


@dataclass
class Med3DSegmenterOutput(ModelOutput):
    """`logits` (B, K, D, H, W) of every voxel and `presence` (B, K), of the finding being there at all, float32; `loss` if there were masks."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    presence: Tensor | None = None


class Med3DSegmenter(Portable, PreTrainedModel):
    """Med3DCLIP, a decoder over its encoder's stages, and a projection of texts to queries."""

    config_class = Med3DSegmenterConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the text encoder says which it knows

    def __init__(self, config: Med3DSegmenterConfig, clip: Med3DCLIP | None = None) -> None:
        super().__init__(config)
        if clip is None:
            if config.clip_config is None:
                raise ValueError("a Med3DSegmenter needs the settings of a Med3DCLIP (clip_config), or one; see Med3DSegmenter.from_clip")
            clip = Med3DCLIP(config.clip_config)
        self.clip = clip
        self.head = build_head(self.clip.vision_encoder, {name: getattr(config, name) for name in DECODER_SETTINGS})
        self.query = query_projection(self.clip.text_encoder.config.hidden_size, config.embedding_dim)
        widths = self.clip.vision_encoder.widths
        if wrong := [level for level in config.token_levels if not -len(widths) <= level < 0]:
            raise ValueError(f"token_levels has {wrong[0]} but counts from the encoder's last output, -1 to -{len(widths)}")
        # A level's tokens, embedded, and a query's own threshold for them.
        self.tokens = nn.ModuleDict({str(level): Linear(widths[level], config.embedding_dim) for level in config.token_levels})
        self.token_bias = nn.ModuleDict({str(level): Linear(config.embedding_dim, 1) for level in config.token_levels})
        self.post_init()

    @classmethod
    def from_clip(cls, clip: Med3DCLIP, **settings: Any) -> "Med3DSegmenter":
        """A fresh decoder on a trained Med3DCLIP; `settings` as in Med3DSegmenterConfig."""
        return cls(Med3DSegmenterConfig(clip.config, **settings), clip)  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        """Every part brings its own initialisation."""

    def train(self, mode: bool = True) -> "Med3DSegmenter":
        """Frozen encoders stay in evaluation mode: without dropout, with the statistics that they have."""
        super().train(mode)
        self.clip.train(mode)
        if not any(parameter.requires_grad for parameter in self.clip.vision_encoder.parameters()):
            self.clip.vision_encoder.eval()
        return self

    def queries(self, text_features: Tensor) -> Tensor:
        """What `pool_text` of the Med3DCLIP gave, (..., C) -> (..., P)."""
        projected: Tensor = self.query(text_features.to(next(self.query.parameters()).dtype))
        return projected

    def segment_from_queries(self, stages: Sequence[Tensor], queries: Tensor, pixel_values: Tensor) -> Med3DSegmenterOutput:
        """Masks for queries (B, K, P) from anywhere, such as a language model's hidden states projected to P.

        Args:
            stages: what the vision encoder gave for `pixel_values`, (B, 1, D, H, W), whose voxels the finest step looks at again.
        """
        return segment_from_queries(self.head, self.clip.vision_encoder, stages, queries, pixel_values)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masks: Tensor | None = None,
        text_features: Tensor | None = None,
        counts: Tensor | None = None,
        stages: Sequence[Tensor] | None = None,
        decoded: int | None = None,
    ) -> Med3DSegmenterOutput:
        """Masks for prompts in volumes (B, 1, D, H, W).

        Args:
            input_ids, attention_mask: (B, K, L); or (N, L), the prompts of all volumes after each other, with `counts`.
            masks: (B, K, D, H, W), where what a prompt says is; all 0 where it is not in the volume. They give the loss.
            text_features: in the place of the two, what the Med3DCLIP's `pool_text` gives: (B, K, C), or (N, C) with `counts`.
            counts: (B) prompts of every volume, N in all; K is then the largest, and masks beyond a volume's own are not looked at.
            stages: what the vision encoder gave for the volumes, where that is known.
            decoded: the first volumes alone get masks, so many of them; the others' tokens learn still (`token_levels`).

        Raises:
            ValueError: prompts are given in no form or in both, or their numbers do not fit to the volumes.
        """
        if (input_ids is None) == (text_features is None) or (input_ids is None) != (attention_mask is None):
            raise ValueError("a Med3DSegmenter takes prompts as input_ids with attention_mask, or as text_features; pass one of the two")
        if text_features is None:
            assert input_ids is not None and attention_mask is not None
            pooled = self.clip.pool_text(input_ids.flatten(0, -2), attention_mask.flatten(0, -2))
            text_features = pooled.unflatten(0, input_ids.shape[:-1])  # (B, K, C) or (N, C)
        asked = None
        if counts is not None:
            text_features, asked = _by_volume(text_features, counts)
        if text_features.ndim != 3 or len(text_features) != len(pixel_values):
            raise ValueError(
                f"prompts are of shape {tuple(text_features.shape[:-1])} for {len(pixel_values)} volumes; pass (B, K) of them, or counts too"
            )
        stages = self.clip.vision_encoder(pixel_values) if stages is None else stages
        queries, first = self.queries(text_features), slice(decoded)
        output = self.segment_from_queries([tokens[first] for tokens in stages], queries[first], pixel_values[first])
        if asked is not None:
            output.logits = output.logits.masked_fill(~asked[first, :, None, None, None], NO_PROMPT)  # type: ignore[union-attr]
            output.presence = output.presence.masked_fill(~asked[first], NO_PROMPT)  # type: ignore[union-attr]
        if masks is not None:
            output.loss = self.loss(output, masks[first], None if asked is None else asked[first])
            if self.config.token_levels:
                output.loss = output.loss + self.config.token_weight * self.token_loss(stages, queries, masks, asked)
        return output

    def token_logits(self, stages: Sequence[Tensor], queries: Tensor) -> dict[int, Tensor]:
        """{level: (B, K, N), float32} of the N tokens of each of `token_levels` holding what queries (B, K, P) ask for."""
        dtype, found = compute_type(queries.dtype, queries.device.type), {}
        with no_autocast(queries):
            queries = queries.to(dtype)
            for level, embed in self.tokens.items():
                products = queries @ embed(stages[int(level)].to(dtype)).transpose(1, 2)
                found[int(level)] = widened(products) * queries.shape[-1] ** -0.5 + widened(self.token_bias[level](queries))
        return found

    def token_loss(self, stages: Sequence[Tensor], queries: Tensor, masks: Tensor, asked: Tensor | None = None) -> Tensor:
        """The mean over levels and volumes of what the volume's prompts cost: cross entropy of whether a part of the mask lies in a token's share.

        The grid divides the volume evenly. An encoder's first cell may look at the volume's border and a middle one across the patient's
        midline (`Encoder.centres`), but every cell sees far enough to learn about its share. The mean within the mask and that outside
        count alike, so that a prompt's share of the cells does not matter.

        Args:
            masks, asked: as in `loss`.
        """
        depth, height, width = masks.shape[2:]
        grids, losses = self.clip.vision_encoder.grids((depth, height, width)), []
        for level, logits in self.token_logits(stages, queries).items():
            held = held_by_cells(masks, grids[level]).to(logits.dtype)  # (B, K, N)
            weights = torch.ones_like(held[:, :, 0]) if asked is None else asked.to(held.dtype)
            within, outside = balanced_mean(nn.functional.binary_cross_entropy_with_logits(logits, held, reduction="none"), held)
            losses.append(prompt_mean(within + outside, weights).mean())
        return torch.stack(losses).mean()

    def loss(self, output: Med3DSegmenterOutput, masks: Tensor, asked: Tensor | None = None) -> Tensor:
        """The mean of `mask_losses` over volumes, so that it does not matter how they are batched."""
        config = self.config
        assert output.logits is not None and output.presence is not None
        return mask_losses(output.logits, output.presence, masks, asked, config.segmentation_loss, config.presence_weight).mean()

    @torch.no_grad()
    def sliding_window(
        self, pixel_values: Tensor, text_features: Tensor, overlap: float = 0.5, batch_size: int = 1
    ) -> Med3DSegmenterOutput:
        """Masks in volumes of any size, by MONAI's sliding windows of the model's size; presence is the highest of all windows.

        Args:
            pixel_values: (B, 1, D, H, W).
            text_features: (B, K, C) or (K, C) for all volumes, see `forward`.
            overlap: of neighbouring windows, as a share of their size. Windows are weighted by a Gaussian about their middle.
            batch_size: windows at once.
        """
        from monai.inferers.inferer import SlidingWindowInferer

        inferer = SlidingWindowInferer(self.clip.config.size, batch_size, overlap, mode="gaussian", padding_mode="replicate")
        queries = self.queries(text_features).expand(len(pixel_values), -1, -1)
        logits, presence = [], []
        for volume, own in zip(pixel_values, queries, strict=True):
            found: list[Tensor] = []

            def predict(windows: Tensor, own: Tensor = own, found: list[Tensor] = found) -> Tensor:
                output = self.segment_from_queries(self.clip.vision_encoder(windows), own.expand(len(windows), -1, -1), windows)
                assert output.logits is not None and output.presence is not None
                found.append(output.presence)
                return output.logits

            logits.append(inferer(volume.unsqueeze(0), predict))
            presence.append(torch.cat(found).amax(dim=0))
        return Med3DSegmenterOutput(logits=torch.cat(logits), presence=torch.stack(presence))  # type: ignore[arg-type]


def build_head(encoder: Any, settings: Mapping[str, Any]) -> SegmentationHead:
    """The head on an encoder; `settings` are the DECODER_SETTINGS of a Med3DSegmenterConfig."""
    widths = settings["decoder_widths"] or encoder.widths[:-1]
    return SegmentationHead(encoder, widths, *(settings[name] for name in DECODER_SETTINGS[1:]))


def query_projection(width: int, dim: int) -> nn.Sequential:
    """What makes a query of a text's or a token's features: (..., width) -> (..., dim)."""
    return nn.Sequential(LayerNorm(width), Linear(width, width), nn.GELU(), Linear(width, dim), LayerNorm(dim))


def segment_from_queries(
    head: SegmentationHead, encoder: Any, stages: Sequence[Tensor], queries: Tensor, pixel_values: Tensor
) -> Med3DSegmenterOutput:
    """Masks for queries (B, K, P) in volumes (B, 1, D, H, W), of which the encoder gave `stages`."""
    depth, height, width = pixel_values.shape[2:]
    cells, whole = head.features(stages, encoder.grids((depth, height, width)), pixel_values)
    logits, presence = head.compare(cells, whole, queries, (depth, height, width))
    return Med3DSegmenterOutput(logits=logits, presence=presence)


def _by_volume(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) and (B) -> (B, K, C), 0 beyond a volume's own, and where there is one, (B, K)."""
    numbers = [int(count) for count in counts]
    if features.ndim != 2 or sum(numbers) != len(features):
        raise ValueError(f"counts are {numbers} for {len(features)} prompts; they must add up to that")
    padded = nn.utils.rnn.pad_sequence(list(features.split(numbers)), batch_first=True)  # (B, K, C)
    asked = torch.arange(padded.shape[1], device=features.device) < torch.tensor(numbers, device=features.device)[:, None]
    return padded, asked


AutoConfig.register(Med3DSegmenterConfig.model_type, Med3DSegmenterConfig)
AutoModel.register(Med3DSegmenterConfig, Med3DSegmenter)
AutoImageProcessor.register(Med3DSegmenterConfig, slow_image_processor_class=VolumeProcessor)
AutoProcessor.register(Med3DSegmenterConfig, Med3DCLIPProcessor)
