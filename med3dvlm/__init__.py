"""Med3DVLM: vision-language models for three-dimensional medical scans. Research software, not a medical device.

Public names are imported at their first use, so that code that needs no model starts at once. Importing a model class registers it with
transformers' Auto classes (see models/).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from med3dvlm.inference.chat import Med3DChat
    from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
    from med3dvlm.models.clip_processor import Med3DCLIPProcessor
    from med3dvlm.models.segmentation import Med3DSegmenter, Med3DSegmenterConfig
    from med3dvlm.models.vlm import Med3DVLM
    from med3dvlm.models.vlm_config import Med3DVLMConfig
    from med3dvlm.models.vlm_processor import Med3DVLMProcessor
    from med3dvlm.preprocessing import VolumeProcessor
    from med3dvlm.volume import Volume, read_volume

__all__ = [
    "Med3DCLIP",
    "Med3DCLIPConfig",
    "Med3DCLIPProcessor",
    "Med3DChat",
    "Med3DSegmenter",
    "Med3DSegmenterConfig",
    "Med3DVLM",
    "Med3DVLMConfig",
    "Med3DVLMProcessor",
    "Volume",
    "VolumeProcessor",
    "read_volume",
]
__version__ = "0.1.0"

_MODULES = {
    "Med3DCLIP": "models.clip",
    "Med3DCLIPConfig": "models.clip",
    "Med3DCLIPProcessor": "models.clip",  # registers it: a processor is loaded by the Auto classes of its parts
    "Med3DChat": "inference.chat",
    "Med3DSegmenter": "models.segmentation",
    "Med3DSegmenterConfig": "models.segmentation",
    "Med3DVLM": "models.vlm",
    "Med3DVLMConfig": "models.vlm",
    "Med3DVLMProcessor": "models.vlm",  # likewise
    "Volume": "volume",
    "VolumeProcessor": "preprocessing",
    "read_volume": "volume",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
