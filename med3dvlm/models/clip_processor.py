"""Med3DCLIPProcessor: prepare volumes and texts for a Med3DCLIP.

Shapes: B volumes of D, H, W voxels; N texts, L tokens.
"""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import cached_file

from med3dvlm.models.portable import Portable, auto_map
from med3dvlm.special_tokens import only_words


def shortest(*limits: int | None) -> int | None:
    """Return the least of the limits on a text's tokens; None where there is none."""
    return min((limit for limit in limits if limit is not None and limit < VERY_LARGE_INTEGER), default=None)


class Med3DCLIPProcessor(Portable, ProcessorMixin):
    """A VolumeProcessor and a tokenizer.

        processor = Med3DCLIPProcessor.from_pretrained("outputs/demo/stage1")
        inputs = processor(volumes="scan.nii.gz", text=["Right pleural effusion."])

    Args:
        max_text_length: tokens of a text, of which the rest is cut; None takes the tokenizer's own limit, if it has one.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, max_text_length: int | None = None) -> None:
        super().__init__(image_processor, tokenizer)
        self.auto_map = auto_map(AutoProcessor="Med3DCLIPProcessor")
        self.max_text_length = shortest(tokenizer.model_max_length) if max_text_length is None else max_text_length

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "Med3DCLIPProcessor":  # type: ignore[override]
        """Load as transformers does. Folders of earlier versions state the length of texts in config.json alone."""
        processor: Med3DCLIPProcessor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if cached_file(pretrained_model_name_or_path, "processor_config.json", _raise_exceptions_for_missing_entries=False) is None:
            longest = AutoConfig.from_pretrained(pretrained_model_name_or_path).longest_text
            processor.max_text_length = shortest(processor.max_text_length, longest)
        return processor

    def __call__(self, volumes: Any = None, text: str | Sequence[str] | None = None) -> BatchFeature:
        """Return `pixel_values` (B, 1, D, H, W) float32 of volumes, and `input_ids` and `attention_mask` (N, L) of texts, padded on the right.

        Args:
            volumes: one scan or a list of them, see `VolumeProcessor.preprocess`.
            text: one text or several. The text of a special token in it is read as words.

        Raises:
            ValueError: neither is given, or no text is; a scan that cannot be used is a VolumeError.
        """
        if volumes is None and text is None:
            raise ValueError("a Med3DCLIPProcessor needs volumes, text, or both; pass at least one")
        batch: dict[str, Any] = {}
        if volumes is not None:
            batch["pixel_values"] = self.image_processor(volumes)["pixel_values"]
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            if not len(texts):
                raise ValueError("a Med3DCLIPProcessor was given an empty list of texts; give at least one")
            words = [only_words(self.tokenizer, one) for one in texts]
            coded = self.tokenizer(
                words, padding=True, padding_side="right", truncation=True, max_length=self.max_text_length, return_tensors="pt"
            )
            batch |= {key: coded[key] for key in ("input_ids", "attention_mask")}
        return BatchFeature(batch)
