"""Med3DVLM: vision-language models for three-dimensional medical scans. Research software, not a medical device."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from med3dvlm.contrastive import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.inference import Med3DChat
from med3dvlm.preprocessing import VolumeProcessor
from med3dvlm.processing import Med3DVLMProcessor
from med3dvlm.vlm import Med3DVLM, Med3DVLMConfig
from med3dvlm.volume import Volume, read_volume

__all__ = [
    "Med3DCLIP",
    "Med3DCLIPConfig",
    "Med3DChat",
    "Med3DVLM",
    "Med3DVLMConfig",
    "Med3DVLMProcessor",
    "Volume",
    "VolumeProcessor",
    "read_volume",
]
__version__ = "0.1.0"

AutoConfig.register("med3d_clip", Med3DCLIPConfig)
AutoConfig.register("med3dvlm", Med3DVLMConfig)
AutoModel.register(Med3DCLIPConfig, Med3DCLIP)
AutoModel.register(Med3DVLMConfig, Med3DVLM)
AutoModelForImageTextToText.register(Med3DVLMConfig, Med3DVLM)
AutoImageProcessor.register(Med3DVLMConfig, slow_image_processor_class=VolumeProcessor)
AutoProcessor.register(Med3DVLMConfig, Med3DVLMProcessor)
