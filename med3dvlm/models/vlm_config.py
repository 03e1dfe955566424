"""Med3DVLMConfig: the settings of a Med3DVLM, and what follows from them."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PretrainedConfig

from med3dvlm.encoders import Size, build_encoder, check_size
from med3dvlm.models.portable import Carried, auto_map
from med3dvlm.projectors import Projector, build_projector

IMAGE_SPLICES = ("mask", "published")


class Med3DVLMConfig(Carried, PretrainedConfig):
    """Settings of a Med3DVLM.

    Args:
        encoder: name of the vision encoder, as in Med3DCLIPConfig.
        encoder_options: its options.
        size: (D, H, W) of the volumes.
        projector: name of the projector, see `build_projector`.
        projector_depth: its depth.
        image_levels: the two outputs of the encoder that the projector takes, counted as in a list (-1 is the last stage): the paper's are
            the last two; (-3, -2) are finer grids, for places, and more tokens.
        position_embedding: whether every token of the two is given its position, learned, before the projector.
        text_config: configuration of the language model, any type that AutoModelForCausalLM knows.
        image_token_id: the placeholder's id; it may lie beyond the language model's vocabulary, since it is never looked up.
        segmentation_config: of what it points with, see `models.pointing.pointing_settings`; None for a model that cannot point, whose
            configuration does not carry it.
        image_splice: "mask", or "published" for weights converted from the released model, which was trained with the
            image one position late: the first placeholder keeps its embedding and the first word is lost.
        language_model_source: where the language model is ("place": a folder, a hub id or package:NAME), in which "dtype" and with which
            "fingerprint", if a folder with this configuration does not hold it; None where it does.
    """

    model_type = "med3dvlm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # `dtype` and `attn_implementation` reach the language model
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder: str = "dcformer_small",
        encoder_options: dict[str, Any] | None = None,
        size: Size = (128, 256, 256),
        projector: str = "mixer",
        projector_depth: int = 2,
        image_levels: Sequence[int] = (-2, -1),
        position_embedding: bool = False,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_token_id: int = 0,
        image_splice: str = "mask",
        segmentation_config: dict[str, Any] | None = None,
        language_model_source: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_splice not in IMAGE_SPLICES:
            raise ValueError(f"image_splice {image_splice!r} is unknown; known: {', '.join(IMAGE_SPLICES)}")
        if (
            len(image_levels) != 2
            or not all(isinstance(level, int) and level < 0 for level in image_levels)
            or image_levels[0] >= image_levels[1]
        ):
            raise ValueError(
                f"image_levels is {list(image_levels)} but must be two outputs of the encoder counted from its end, as [-2, -1]"
            )
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.encoder = encoder
        self.encoder_options = encoder_options or {}
        self.size = check_size(size)
        self.projector = projector
        self.projector_depth = projector_depth
        self.image_levels = list(image_levels)
        self.position_embedding = position_embedding
        self.text_config = text_config
        self.image_token_id = image_token_id
        self.image_splice = image_splice
        self.segmentation_config = segmentation_config
        self.language_model_source = language_model_source
        for name in (
            "attn_implementation",
            "experts_implementation",
        ):  # otherwise the base class drops these settings of the language model
            if (chosen := getattr(text_config, f"_{name}", None)) is not None:
                kwargs.setdefault(name, chosen)
        super().__init__(**kwargs)
        self.auto_map = auto_map(AutoConfig="Med3DVLMConfig", AutoModel="Med3DVLM", AutoModelForImageTextToText="Med3DVLM")

    @cached_property
    def num_image_tokens(self) -> int:
        """Return the placeholders that one volume takes: the tokens of the projector on the encoder's grids."""
        with torch.device("meta"):
            return self._build_projector(build_encoder(self.encoder, size=self.size, **self.encoder_options)).num_tokens

    @property
    def language_width(self) -> int:
        """Return the width of the language model's embeddings."""
        if self.text_config is None:
            raise ValueError("text_config is missing: the configuration of a causal language model")
        return int(self.text_config.hidden_size)

    def _build_projector(self, encoder: Any) -> Projector:
        grids, widths, first = encoder.grids(self.size), encoder.widths, self.image_levels[0]
        if len(grids) < -first:
            raise ValueError(
                f"image_levels is {self.image_levels} but {self.encoder} has {len(grids)} outputs; take levels from -{len(grids)}"
            )
        (low, high), (narrow, wide) = self.levels_of(grids), self.levels_of(widths)
        return build_projector(
            self.projector, (low, high), (narrow, wide), self.language_width, self.projector_depth, self.position_embedding
        )

    def levels_of(self, outputs: Sequence[Any]) -> tuple[Any, Any]:
        """Select the two `image_levels` from a list with an entry for every output of the encoder."""
        low, high = self.image_levels
        return outputs[low], outputs[high]

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        settings.pop("num_image_tokens", None)  # derived
        for name in ("segmentation_config", "language_model_source"):
            if settings.get(name) is None:
                settings.pop(name, None)
        return settings
