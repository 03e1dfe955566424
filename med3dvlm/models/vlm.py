"""Med3DVLM: vision encoder -> projector -> any causal language model (Med3DVLM paper, section 3.2 and Figure 1).

Image features replace the placeholder tokens by mask, and their number is checked; nothing here names a family of language models.

Shapes: B conversations; L tokens; N image tokens; E width of the language model; V its vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from med3dvlm.encoders import build_encoder
from med3dvlm.models.branch_attention import numbered, use_pieces
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.language_models import attention_kinds, branch_scores, packing_obstacle, scaled_logits
from med3dvlm.models.pointing import Pointing
from med3dvlm.models.portable import Portable
from med3dvlm.models.vlm_config import Med3DVLMConfig
from med3dvlm.models.vlm_processor import IGNORED, Med3DVLMProcessor, branch_mask
from med3dvlm.preprocessing import VolumeProcessor

DENSE = 1024  # tokens of a row, up to which one mask of all by all is quicker than attention in pieces


@dataclass
class Med3DVLMOutput(ModelOutput):
    """`logits` (B, L, V), or (labelled positions, V) when labels are given: only those are computed.

    Where masks are given, `loss` is the sum of `language_loss` and the mean of `mask_losses` (B), which are weighted by `mask_weight`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    language_loss: Tensor | None = None
    mask_losses: Tensor | None = None


class Med3DVLM(Portable, PreTrainedModel, GenerationMixin):
    """A language model that reads a 3D scan, and points at places in it if it has `pointing`.

    Attributes:
        mask_weight: of the loss of masks, added to that of words.
    """

    mask_weight = 1.0

    config_class = Med3DVLMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the language model, whose attention it is, refuses what it has not

    def __init__(
        self, config: Med3DVLMConfig, vision_encoder: nn.Module | None = None, language_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if language_model is None and config.language_model_source is not None:
            raise ValueError(
                f"this model's folder does not hold its language model, which is in {config.language_model_source['place']}; load it with "
                "med3dvlm.checkpoints.load_vlm"
            )
        self.vision_encoder: Any = (
            vision_encoder if vision_encoder is not None else build_encoder(config.encoder, size=config.size, **config.encoder_options)
        )
        self.projector = config._build_projector(self.vision_encoder)
        self.language_model: Any = language_model if language_model is not None else AutoModelForCausalLM.from_config(config.text_config)
        self.pointing: Pointing | None = None
        if config.segmentation_config is not None:
            self.pointing = Pointing(self.vision_encoder, config.language_width, config.segmentation_config)
        self._tied_weights_keys = {
            f"language_model.{one}": f"language_model.{other}" for one, other in (self.language_model._tied_weights_keys or {}).items()
        }
        self.post_init()

    @classmethod
    def from_parts(cls, clip: Med3DCLIP, language_model: PreTrainedModel, image_token_id: int, **settings: Any) -> "Med3DVLM":
        """Build a model from the encoder of a stage-1 model, a new projector and a pretrained language model."""
        shared = {key: getattr(clip.config, key) for key in ("encoder", "encoder_options", "size")}
        config = Med3DVLMConfig(**shared, text_config=language_model.config, image_token_id=image_token_id, **settings)
        return cls(config, clip.vision_encoder, language_model)

    def add_pointing(self, settings: dict[str, Any]) -> None:
        """Let the model point, with a fresh head and projection; the language model's tables get rows for the token if they have none.

        Args:
            settings: see `pointing_settings`.
        """
        self.config.segmentation_config = settings
        self.pointing = Pointing(self.vision_encoder, self.config.language_width, settings).to(self.device, self.dtype)
        if (token := self.pointing.token_id) >= self.language_model.get_input_embeddings().weight.shape[0]:
            self.language_model.resize_token_embeddings(token + 1, mean_resizing=False)
            self.config.text_config = self.language_model.config
        self.pointing.initialise_token(self.language_model)

    def _init_weights(self, module: nn.Module) -> None:
        """Every part brings its own initialisation."""

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """Save as transformers does; without the language model where `language_model_source` says where that is."""
        if self.config.language_model_source is not None:
            weights = self.state_dict() if state_dict is None else state_dict
            state_dict = {name: weight for name, weight in weights.items() if not name.startswith("language_model.")}
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def train(self, mode: bool = True) -> "Med3DVLM":
        """Set training mode; a frozen encoder stays in evaluation mode, so that its batch norm does not follow the batches."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_encoder.parameters()):
            self.vision_encoder.eval()
        return self

    @property
    def generation_config(self) -> Any:
        """The language model's, which generates; saved and loaded with the whole model."""
        return self.language_model.generation_config

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        if "language_model" in self._modules:  # otherwise the base class is being initialised
            self.language_model.generation_config = settings

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    @property
    def packing_obstacle(self) -> str | None:
        """Return why several conversations cannot share a row (see `Med3DVLMProcessor.branch`), as a clause; None where they can."""
        if self.config.image_splice == "published":
            return "with image_splice 'published' the image takes the place of the first token of the first conversation alone"
        return packing_obstacle(self.language_model)

    def encode_image(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode volumes (B, 1, D, H, W) to the tokens of the two `image_levels`, by default the last two stages: (B, n_low, C_low), (B,
        n_high, C_high).
        """
        return self.config.levels_of(self.vision_encoder(pixel_values))

    def embed(self, input_ids: Tensor, image_features: tuple[Tensor, Tensor] | None) -> Tensor:
        """Embed tokens (B, L) to (B, L, E), with the image's features in place of the placeholders.

        Raises:
            ValueError: placeholders and image features differ in number.
        """
        placeholders = input_ids == self.config.image_token_id
        embeds = self._words(input_ids.masked_fill(placeholders, 0))
        if image_features is None:
            if placeholders.any():
                raise ValueError(f"the text has {int(placeholders.sum())} image tokens, but no volume was given")
            return embeds
        image = self.projector(*image_features).to(embeds.dtype)  # (B, N, E)
        rows, per_row = placeholders.any(dim=1).sum(), placeholders.sum(dim=1)
        if int(rows) != image.shape[0] or not bool(((per_row == image.shape[1]) | (per_row == 0)).all()):
            raise ValueError(
                f"image tokens and image features do not match: the text has {per_row.tolist()} placeholders in its rows, "
                f"{image.shape[0]} volumes give {image.shape[1]} features each"
            )
        if self.config.image_splice == "published":
            if placeholders[:, -1].any():
                raise ValueError("image_splice 'published' needs text after the image, whose first token it replaces")
            # The released model writes features to positions 1..N although the placeholders stand at 0..N-1.
            embeds = self._words(input_ids)
            placeholders = placeholders.roll(1, dims=1)
        return embeds.masked_scatter(placeholders.unsqueeze(-1), image)

    def _words(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        return embeds if self.pointing is None else self.pointing.embed(input_ids, embeds, self.language_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        answer_lengths: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        masks: Tensor | None = None,
        points: Tensor | None = None,
        num_rows_in_batch: int | None = None,
        branches: Tensor | None = None,
        **kwargs: Any,
    ) -> Med3DVLMOutput:
        """Return next-token logits, or the loss over the labelled tokens.

        Args:
            input_ids: (B, L).
            labels: (B, L); -100 is left out.
            attention_mask: (B, L).
            pixel_values: (B, 1, D, H, W), or instead
            image_features: what `encode_image` gave for them.
            answer_lengths: (B, L) from `processing.answer_lengths`: every conversation counts alike, its labelled tokens share its weight.
                Without, every labelled token counts alike.
            num_items_in_batch: `count_items` of the whole step, by which the loss is divided when gradients are accumulated.
            masks, points: with labels and pixel_values, where the pointing tokens point: see `Pointing.losses`.
            num_rows_in_batch: of the whole step, by which the loss of masks is divided.
            branches: (B, L), where rows hold several conversations, with `position_ids` (B, L): see Med3DVLMProcessor.branch.

        Raises:
            ValueError: image tokens and features do not match, or rows hold several conversations and this model takes one.
        """
        stages = None
        if pixel_values is not None:
            stages = self.vision_encoder(pixel_values)
            image_features = self.config.levels_of(stages)
        hidden = self._hidden(input_ids, attention_mask, image_features, position_ids, branches)
        own = None if self.pointing is None else (self.pointing.token_id, self.pointing.rows(self.language_model)[1])
        if labels is None:
            return Med3DVLMOutput(logits=scaled_logits(self.language_model, hidden, own))
        wanted = labels[:, 1:] != IGNORED  # position i predicts token i + 1
        logits = scaled_logits(self.language_model, hidden[:, :-1][wanted], own)  # (labelled, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="none")
        if answer_lengths is not None:
            losses = losses / answer_lengths[:, 1:][wanted]
        if num_items_in_batch is None:
            num_items_in_batch = count_items({"labels": labels, "answer_lengths": answer_lengths}).clamp_min(1)
        loss = losses.sum() / num_items_in_batch
        output = Med3DVLMOutput(loss=loss, logits=logits)
        if masks is not None:
            if self.pointing is None or stages is None or pixel_values is None or points is None:
                raise ValueError("masks need a model that points, the volumes (pixel_values, not image_features), and points")
            states = [hidden[row][ids == self.pointing.token_id] for row, ids in enumerate(input_ids)]
            output.language_loss = loss
            output.mask_losses = self.mask_weight * self.pointing.losses(self.vision_encoder, stages, pixel_values, states, masks, points)
            output.loss = loss + output.mask_losses.sum() / (num_rows_in_batch or len(input_ids))
        return output

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_features: tuple[Tensor, Tensor] | None,
        position_ids: Tensor | None = None,
        branches: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's states, (B, L, E)."""
        embeds = self.embed(input_ids, image_features)
        mask: Any = attention_mask if branches is None else self._branch_mask(branches, position_ids, embeds.dtype)
        decoder = self.language_model.get_decoder()
        hidden: Tensor = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, use_cache=False).last_hidden_state
        if (layout := getattr(mask, "branch_layout", None)) is not None and not layout.used:
            kind = self.config.text_config.model_type
            raise ValueError(
                f"the language model ({kind}) did not use the attention over branches; call set_attn_implementation('eager'), which attends by a mask"
            )
        return hidden

    def _branch_mask(self, branches: Tensor, position_ids: Tensor | None, dtype: torch.dtype) -> Any:
        """Make the mask that keeps branches (B, L) apart: their numbers for long rows, where the language model can attend in pieces."""
        if (reason := self.packing_obstacle) is not None:
            raise ValueError(f"several conversations cannot share a row: {reason}; give each a row of its own and a mask (B, L)")
        if position_ids is None:
            raise ValueError("branches need the position_ids that Med3DVLMProcessor.branch gives with them")
        config = self.language_model.config.get_text_config()
        if branches.shape[1] > DENSE and attention_kinds(config) == {"full_attention"} and use_pieces(self.language_model):
            return numbered(branches)
        return branch_scores(config, branch_mask(branches), position_ids, dtype)

    @torch.no_grad()
    def point(self, input_ids: Tensor, image_features: tuple[Tensor, Tensor]) -> Tensor:
        """Return the queries of the pointing tokens of one conversation (1, L), in their order: (K, P), for `Pointing.draw`."""
        if self.pointing is None:
            raise ValueError("this model cannot point; train stage 3 with --segmenter")
        hidden = self._hidden(input_ids, None, image_features)
        return self.pointing.queries(hidden[input_ids == self.pointing.token_id])

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the language model's `generate`, with its arguments, after the image; returns the new tokens alone. Pad batches on the left."""
        if pixel_values is not None:
            image_features = self.encode_image(pixel_values)
        embeds = self.embed(input_ids, image_features)
        if self.pointing is not None:
            self.pointing.write_token(self.language_model)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.language_model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def count_items(batch: Mapping[str, Any]) -> Tensor:
    """Count the items that the loss of a batch averages over, as a float32 scalar: labelled tokens that are predicted, or conversations.

    Over the batches of a step, on all processes, the sum is `num_items_in_batch`.

    Args:
        batch: `labels` (B, L), and `answer_lengths` (B, L) where every conversation counts alike.
    """
    wanted = batch["labels"][:, 1:] != IGNORED
    if batch.get("answer_lengths") is None:
        return wanted.sum().float()
    return (1 / batch["answer_lengths"][:, 1:][wanted].double()).sum().round().float()


AutoConfig.register(Med3DVLMConfig.model_type, Med3DVLMConfig)
AutoModel.register(Med3DVLMConfig, Med3DVLM)
AutoModelForImageTextToText.register(Med3DVLMConfig, Med3DVLM)
AutoImageProcessor.register(Med3DVLMConfig, slow_image_processor_class=VolumeProcessor)
AutoProcessor.register(Med3DVLMConfig, Med3DVLMProcessor)
