"""Med3DCLIP: a vision encoder and a text encoder that meet in one space, trained by SigLIP or CLIP (Med3DVLM paper, section 3.2.1).

The losses are open_clip's, which gather the texts of every process; this file knows no encoder by name. Whatever type the weights have, all
that follows the projections is computed in float32, or in float64 where they are: embeddings, temperature, and loss.

Shapes: B volumes, as many texts; L text tokens; P projection width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from med3dvlm.encoders import Size, build_encoder, check_size
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.models.portable import Carried, Portable, auto_map
from med3dvlm.preprocessing import VolumeProcessor

LOSSES = ("siglip", "clip")
POOLINGS = ("cls", "mean")
IMAGE_POOLINGS = ("mean", "frames")
MAX_TEMPERATURE = 100.0  # as CLIP and open_clip bound it


class CXRBertConfig(BertConfig):
    """CXR-BERT (microsoft/BiomedVLP-CXR-BERT-specialized) as CT-CLIP uses it: a BERT. So its repository's own code is not run."""

    model_type = "cxr-bert"


class CXRBertModel(BertModel):
    config_class = CXRBertConfig


AutoConfig.register(CXRBertConfig.model_type, CXRBertConfig)
AutoModel.register(CXRBertConfig, CXRBertModel)
AutoTokenizer.register(CXRBertConfig, BertTokenizer)


class Med3DCLIPConfig(Carried, PretrainedConfig):
    """Settings of a Med3DCLIP.

    Args:
        encoder: name of the vision encoder, see `list_encoders`; `encoder_options` override its constructor's arguments.
        size: (D, H, W) of the volumes.
        image_stages: how many of the last stages are mean-pooled and joined; the papers use 1.
        image_pooling: "mean" over all tokens, or "frames": over the first axis of the grid alone, the rest laid end to end (CT-CLIP).
        text_config: configuration of the text encoder, any model type that AutoModel knows.
        text_pooling: "cls" (papers) or "mean" over the text's tokens (sentence encoders such as MiniLM).
        projection_dim: width of the common space.
        projection_bias: whether the projections into it have one; CT-CLIP's have none.
        loss: "siglip" or "clip".
        logit_scale: initial log temperature. None takes SigLIP's own, log 10; for "clip" log(1/0.07).
        logit_bias: initial bias. None takes SigLIP's own, -10; "clip" has none.
    """

    model_type = "med3d_clip"
    has_no_defaults_at_init = True
    sub_configs = {"text_config": AutoConfig}  # `dtype` and `attn_implementation` are handed on to the text encoder

    def __init__(
        self,
        encoder: str = "dcformer_small",
        encoder_options: dict[str, Any] | None = None,
        size: Size = (128, 256, 256),
        image_stages: int = 1,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        text_pooling: str = "cls",
        projection_dim: int = 768,
        loss: str = "siglip",
        logit_scale: float | None = None,
        logit_bias: float | None = None,
        image_pooling: str = "mean",
        projection_bias: bool = True,
        **kwargs: Any,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is unknown; known: {', '.join(LOSSES)}")
        if text_pooling not in POOLINGS:
            raise ValueError(f"text pooling {text_pooling!r} is unknown; known: {', '.join(POOLINGS)}")
        if image_pooling not in IMAGE_POOLINGS:
            raise ValueError(f"image pooling {image_pooling!r} is unknown; known: {', '.join(IMAGE_POOLINGS)}")
        if image_pooling == "frames" and image_stages != 1:
            raise ValueError(f"image pooling 'frames' takes the last stage alone, but image_stages is {image_stages}; pass image_stages 1")
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        siglip = loss == "siglip"
        self.encoder = encoder
        self.encoder_options = encoder_options or {}
        self.size = check_size(size)
        self.image_stages = image_stages
        self.image_pooling = image_pooling
        self.text_config = text_config
        self.text_pooling = text_pooling
        self.projection_dim = projection_dim
        self.projection_bias = projection_bias
        self.loss = loss
        self.logit_scale = logit_scale if logit_scale is not None else (2.302585092994046 if siglip else 2.6592600369327779)
        self.logit_bias = logit_bias if logit_bias is not None else (-10.0 if siglip else 0.0)
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = {}  # None would unset that of a text encoder which is there already
        super().__init__(**kwargs)
        self.auto_map = auto_map(AutoConfig="Med3DCLIPConfig", AutoModel="Med3DCLIP")

    @property
    def longest_text(self) -> int | None:
        """Return the most tokens that the text encoder reads; None where it has no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)


@dataclass
class Med3DCLIPOutput(ModelOutput):
    """`image_embeds` (B, P), `text_embeds` (k*B, P), float32, L2-normalised; `loss` of the batch over all processes, if asked for."""

    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class _AtMost(torch.autograd.Function):
    """A tensor, bounded above. Its gradient passes, except where following it would lead above the bound, or further above."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(value >= bound)
        return value.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (at_bound,) = ctx.saved_tensors
        return gradient.masked_fill(at_bound & (gradient < 0), 0), None


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class Med3DCLIP(Portable, PreTrainedModel):
    """Vision encoder x text encoder. Both sides are projected linearly and L2-normalised.

    A pooler of the text encoder is frozen: texts are pooled without it, so that it never gets a gradient.
    """

    config_class = Med3DCLIPConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the text encoder says which it knows; nothing else has a choice

    def __init__(self, config: Med3DCLIPConfig, text_encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.vision_encoder = build_encoder(config.encoder, size=config.size, **config.encoder_options)
        if text_encoder is None:
            text_encoder = AutoModel.from_config(config.text_config, dtype=torch.get_default_dtype())  # the type of all other parts
        self.text_encoder = text_encoder
        if (pooler := getattr(text_encoder, "pooler", None)) is not None:
            pooler.requires_grad_(False)
        if not 1 <= config.image_stages <= len(self.vision_encoder.widths):
            raise ValueError(
                f"image_stages is {config.image_stages} but must be from 1 to {len(self.vision_encoder.widths)}, the stages of {config.encoder}"
            )
        pooled = sum(self.vision_encoder.widths[-config.image_stages :])
        if config.image_pooling == "frames":
            _, height, width = self.vision_encoder.grids(config.size)[-1]
            pooled *= height * width
        self.image_projection = nn.Linear(pooled, config.projection_dim, bias=config.projection_bias)
        self.text_projection = nn.Linear(self.text_encoder.config.hidden_size, config.projection_dim, bias=config.projection_bias)
        # One element each, not zero dimensions: DeepSpeed cannot broadcast a scalar parameter.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale)))
        bias = torch.full((1,), float(config.logit_bias))
        if config.loss == "siglip":
            self.logit_bias: Tensor = nn.Parameter(bias)
        else:
            # CLIP has no bias, and several processes never finish averaging while a parameter waits for a gradient.
            self.register_buffer("logit_bias", bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every part brings its own initialisation."""

    def encode_image(self, pixel_values: Tensor, stages: Sequence[Tensor] | None = None) -> Tensor:
        """Encode volumes (B, 1, D, H, W) to (B, P) float32, L2-normalised. `stages`: the vision encoder's outputs for them, if known."""
        stages = (self.vision_encoder(pixel_values) if stages is None else stages)[-self.config.image_stages :]
        if self.config.image_pooling == "frames":
            depth, height, width = pixel_values.shape[2:]
            frames = self.vision_encoder.grids((depth, height, width))[-1][0]
            pooled = stages[0].unflatten(1, (frames, -1)).mean(dim=1).flatten(1)  # (B, h*w*C)
        else:
            pooled = torch.cat([tokens.mean(dim=1) for tokens in stages], dim=-1)  # (B, sum of C)
        return self._project(self.image_projection, pooled)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts (B, L) to (B, P) float32, L2-normalised."""
        return self.project_text(self.pool_text(input_ids, attention_mask))

    def pool_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool texts (B, L) to (B, C), C the width of the text encoder."""
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, C)
        if self.config.text_pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1)
        total = (hidden * mask).sum(dim=1, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return (total / mask.sum(dim=1)).to(hidden.dtype)

    def project_text(self, pooled: Tensor) -> Tensor:
        """Project (B, C) of any type to (B, P) float32, L2-normalised."""
        return self._project(self.text_projection, pooled)

    @staticmethod
    def _project(projection: nn.Linear, pooled: Tensor) -> Tensor:
        return nn.functional.normalize(_at_least_float32(projection(pooled.to(projection.weight.dtype))), dim=-1)

    @property
    def temperature(self) -> Tensor:
        """Return the factor (1) float32 of similarities, exp(logit_scale), at most MAX_TEMPERATURE.

        It is bounded here, not in the parameter, which some engines overwrite with a copy of their own after each step.
        """
        bounded: Tensor = _AtMost.apply(_at_least_float32(self.logit_scale), math.log(MAX_TEMPERATURE))
        return bounded.exp()

    def train(self, mode: bool = True) -> "Med3DCLIP":
        """Set training mode; a frozen text encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_features: Tensor | None = None,
        return_loss: bool = True,
        stages: Sequence[Tensor] | None = None,
    ) -> Med3DCLIPOutput:
        """Compute embeddings and, for pairs, the loss.

        A row is one pair: `pixel_values` (B, 1, D, H, W) with `input_ids` and `attention_mask` (B, L), or with the output of `pool_text`.

        Of several texts a volume, k times B, the first B belong to the volumes in their order, and so do the next. The loss is the mean of theirs.

        Raises:
            ValueError: texts are given in no form or in both, or not equally many for each volume.
        """
        texts = input_ids if text_features is None else text_features
        if texts is None or (input_ids is None) == (text_features is None) or (input_ids is None) != (attention_mask is None):
            raise ValueError("a Med3DCLIP takes texts as input_ids with attention_mask, or as text_features; pass one of the two")
        if not len(texts) or len(texts) % len(pixel_values):
            raise ValueError(f"there are {len(texts)} texts for {len(pixel_values)} volumes; pass equally many for each volume")
        image_embeds = self.encode_image(pixel_values, stages)
        if attention_mask is not None:
            parts = zip(texts.split(len(image_embeds)), attention_mask.split(len(image_embeds)), strict=True)
            lengths = ((ids, mask, int(mask.sum(dim=1).max())) for ids, mask in parts)  # second texts may be much shorter
            texts = torch.cat([self.pool_text(ids[:, :length], mask[:, :length]) for ids, mask, length in lengths])
        text_embeds = self.project_text(texts)
        loss = None
        if return_loss:
            losses = [self.contrast(image_embeds, part) for part in text_embeds.split(len(image_embeds))]
            loss = torch.stack(losses).mean()
        return Med3DCLIPOutput(loss=loss, image_embeds=image_embeds, text_embeds=text_embeds)

    def contrast(self, image_embeds: Tensor, text_embeds: Tensor, gather: bool = True) -> Tensor:
        """Return the loss of pairs (B, P), as one number.

        Args:
            gather: take the pairs for this process's part of a batch, contrasted with the texts of all processes: the mean over processes is
                the loss of the whole batch. False takes them for the whole batch.
        """
        from open_clip.loss import ClipLoss, SigLipLoss

        distributed = gather and torch.distributed.is_available() and torch.distributed.is_initialized()
        place = {"rank": torch.distributed.get_rank(), "world_size": torch.distributed.get_world_size()} if distributed else {}
        embeds = (_at_least_float32(image_embeds), _at_least_float32(text_embeds))
        with torch.autocast(image_embeds.device.type, enabled=False):
            if self.config.loss == "siglip":
                loss = SigLipLoss(dist_impl="gather", **place)(*embeds, self.temperature, _at_least_float32(self.logit_bias))
            else:
                loss = ClipLoss(local_loss=True, gather_with_grad=True, **place)(*embeds, self.temperature)
        return loss.squeeze()


AutoConfig.register(Med3DCLIPConfig.model_type, Med3DCLIPConfig)
AutoModel.register(Med3DCLIPConfig, Med3DCLIP)
AutoImageProcessor.register(Med3DCLIPConfig, slow_image_processor_class=VolumeProcessor)
AutoProcessor.register(Med3DCLIPConfig, Med3DCLIPProcessor)
