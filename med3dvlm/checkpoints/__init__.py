"""Model directories: find them, write them, load them, merge LoRA into them.

A directory holds safetensors, config.json, the tokenizer and the VolumeProcessor; a LoRA run holds a PEFT adapter and the path of its base.
A bare encoder or projector, converted from a released file, holds model.safetensors and a config.json with its name and arguments.
"""

from med3dvlm.checkpoints.convert.conversion import Conversion, convert_published
from med3dvlm.checkpoints.loading import (
    configuration_of,
    load_clip,
    load_encoder,
    load_language_model,
    load_projector,
    load_segmenter,
    load_vlm,
    locate_model,
    model_type,
    require_weights,
)
from med3dvlm.checkpoints.merging import POINTING_FILE, load_adapted, merge_lora, require_same_origin, verify_equal

__all__ = [
    "POINTING_FILE",
    "Conversion",
    "configuration_of",
    "convert_published",
    "load_adapted",
    "load_clip",
    "load_encoder",
    "load_language_model",
    "load_projector",
    "load_segmenter",
    "load_vlm",
    "locate_model",
    "merge_lora",
    "model_type",
    "require_same_origin",
    "require_weights",
    "verify_equal",
]
