"""A small Med3DChat with random weights."""

from typing import Any

import torch

from med3dvlm import Med3DChat, Med3DVLM, Med3DVLMConfig, Med3DVLMProcessor, VolumeProcessor
from tests import tiny_parts

SIZE = (32, 64, 64)


def build(family: str, **settings: Any) -> Med3DChat:
    """Build a chat with random weights; its answers depend on scan, question and history, and end by chance or at their limit."""
    torch.manual_seed(0)
    words = tiny_parts.tokenizer()
    language_model = tiny_parts.language_model(family, vocab_size=len(words) + 1, **settings)
    options = {"widths": [8, 8, 16, 16, 32], "layer_scale": 0.1}
    config = Med3DVLMConfig("dcformer_nano", options, SIZE, text_config=language_model.config, image_token_id=len(words))
    processor = Med3DVLMProcessor(VolumeProcessor(size=SIZE), words, config.num_image_tokens)
    model = Med3DVLM(config, language_model=language_model)
    torch.nn.init.normal_(model.projector.parameters().__next__(), std=0.3)
    return Med3DChat(model.eval(), processor)
