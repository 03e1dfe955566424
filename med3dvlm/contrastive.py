"""Med3DCLIP: a vision encoder and a text encoder that meet in one space, trained by SigLIP or CLIP (Med3DVLM paper, section 3.2.1).

The losses are open_clip's, which gather the texts of every process; this file knows no encoder by name.

Shapes: B volumes, as many texts; L text tokens; P projection width.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from med3dvlm.encoders import Size, build_encoder, check_size

LOSSES = ("siglip", "clip")
POOLINGS = ("cls", "mean")
IMAGE_POOLINGS = ("mean", "frames")


class Med3DCLIPConfig(PretrainedConfig):
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
        logit_scale, logit_bias: initial log temperature and bias. None takes SigLIP's own, log 10 and -10; for "clip" log(1/0.07) and no bias.
    """

    model_type = "med3d_clip"
    has_no_defaults_at_init = True

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
            raise ValueError(f"image pooling 'frames' takes the last stage alone, but image_stages is {image_stages}")
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
        super().__init__(**kwargs)


@dataclass
class Med3DCLIPOutput(ModelOutput):
    """`image_embeds`, `text_embeds`: (B, P), L2-normalised; `loss` of the batch over all processes, if asked for."""

    loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class Med3DCLIP(PreTrainedModel):
    """Vision encoder x text encoder. Both sides are projected linearly and L2-normalised."""

    config_class = Med3DCLIPConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = False

    def __init__(self, config: Med3DCLIPConfig, text_encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.vision_encoder = build_encoder(config.encoder, size=config.size, **config.encoder_options)
        self.text_encoder = text_encoder if text_encoder is not None else AutoModel.from_config(config.text_config)
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

    @classmethod
    def from_text_encoder(cls, config: Med3DCLIPConfig, text_encoder: str) -> "Med3DCLIP":
        """A new model whose text side starts from pretrained weights, a local directory or a hub id."""
        encoder = AutoModel.from_pretrained(text_encoder)
        config.text_config = encoder.config
        return cls(config, encoder)

    def _init_weights(self, module: nn.Module) -> None:
        """Every part brings its own initialisation."""

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 1, D, H, W) -> (B, P), L2-normalised."""
        stages = self.vision_encoder(pixel_values)[-self.config.image_stages :]
        if self.config.image_pooling == "frames":
            depth, height, width = pixel_values.shape[2:]
            frames = self.vision_encoder.grids((depth, height, width))[-1][0]
            pooled = stages[0].unflatten(1, (frames, -1)).mean(dim=1).flatten(1)  # (B, h*w*C)
        else:
            pooled = torch.cat([tokens.mean(dim=1) for tokens in stages], dim=-1)  # (B, sum of C)
        return nn.functional.normalize(self.image_projection(pooled), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) -> (B, P), L2-normalised."""
        return self.project_text(self.pool_text(input_ids, attention_mask))

    def pool_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) -> (B, C), C the width of the text encoder."""
        hidden = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, L, C)
        if self.config.text_pooling == "cls":
            return hidden[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)

    def project_text(self, pooled: Tensor) -> Tensor:
        """(B, C) -> (B, P), L2-normalised."""
        return nn.functional.normalize(self.text_projection(pooled), dim=-1)

    def train(self, mode: bool = True) -> "Med3DCLIP":
        """A frozen text encoder stays in evaluation mode, without dropout."""
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
    ) -> Med3DCLIPOutput:
        """One pair a row: `pixel_values` (B, 1, D, H, W) with `input_ids` and `attention_mask` (B, L), or with what `pool_text` gave for them."""
        image_embeds = self.encode_image(pixel_values)
        if text_features is None:
            assert input_ids is not None and attention_mask is not None
            text_features = self.pool_text(input_ids, attention_mask)
        text_embeds = self.project_text(text_features)
        loss = self.contrast(image_embeds, text_embeds) if return_loss else None
        return Med3DCLIPOutput(loss=loss, image_embeds=image_embeds, text_embeds=text_embeds)

    def contrast(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """The loss of this process's pairs against the texts of all processes; its mean over processes is that of the whole batch."""
        if self.config.loss == "siglip":
            return self._loss_function(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias).squeeze()
        return self._loss_function(image_embeds, text_embeds, self.logit_scale.exp()).squeeze()

    @cached_property
    def _loss_function(self) -> nn.Module:
        """Made at the first batch, when the processes know of each other."""
        from open_clip.loss import ClipLoss, SigLipLoss

        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world_size = torch.distributed.get_world_size() if distributed else 1
        if self.config.loss == "siglip":
            return SigLipLoss(rank=rank, world_size=world_size, dist_impl="gather")
        return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)


AutoConfig.register(Med3DCLIPConfig.model_type, Med3DCLIPConfig)
AutoModel.register(Med3DCLIPConfig, Med3DCLIP)
