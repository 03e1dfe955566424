"""Export: the language model of a trained Med3DVLM as the plain model that it is, for engines that know nothing of scans (vLLM).

The folder holds what AutoModelForCausalLM and AutoTokenizer load: weights, tokenizer, chat template, generation settings. The rows of a pointing
token are among the embeddings. Encoder and projector stay in the model's own folder: they make the embeddings that such an engine is sent.
"""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from med3dvlm.checkpoints import load_vlm
from med3dvlm.files import atomic_folder, write_json, write_text
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import Med3DVLMProcessor, end_tokens
from med3dvlm.prompts import RESEARCH_NOTICE

CARD = """# A language model for scans

The language model of a Med3DVLM, without its image side. Alone it has seen no scan: serve it with `vllm serve FOLDER --enable-prompt-embeds`, and ask
it by `med3dvlm serve MODEL --engine vllm --vllm-url URL`, whose encoder and projector make an image's embeddings.

{notice}
"""


def export_language_model(path: str | Path, destination: str | Path) -> None:
    """Write the language model of the Med3DVLM in `path` to `destination`.

    Raises:
        FileNotFoundError: there is no model, or it was not merged.
        ValueError: it is a model of another kind.
        FileExistsError: `destination` is there already.
    """
    model, processor = load_vlm(path)
    with atomic_folder(Path(destination)) as aside:
        save_language_model(model, processor, aside)


def save_language_model(model: Med3DVLM, processor: Med3DVLMProcessor, folder: Path) -> None:
    """Save the language model of a loaded model."""
    language_model, tokenizer = model.language_model, processor.tokenizer
    if model.pointing is not None:
        model.pointing.write_token(language_model)
    settings = language_model.generation_config
    language_model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=end_tokens(processor, model), pad_token_id=processor.pad_token_id
    )
    try:
        language_model.save_pretrained(folder)
    finally:
        language_model.generation_config = settings
    tokenizer.save_pretrained(folder)
    if tokenizer.chat_template != processor.chat_template:
        write_text(folder / "chat_template.jinja", str(processor.chat_template))
    beyond = processor.image_token_id >= language_model.get_input_embeddings().weight.shape[0]
    _settle(folder, (processor.image_token, processor.image_token_id) if beyond else None)
    write_text(folder / "README.md", CARD.format(notice=RESEARCH_NOTICE))


def _settle(folder: Path, dropped: tuple[str, int] | None) -> None:
    """Make a saved tokenizer that of a language model alone: without our processor's name, and without `dropped`, an added token, the last
    one: nothing that is asked may ask for a row that is not there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if not (folder / name).is_file():
            continue
        settings: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8-sig"))
        settings.pop("processor_class", None)
        if dropped is not None:
            token, token_id = dropped
            settings.pop(token, None)
            settings.get("added_tokens_decoder", {}).pop(str(token_id), None)
            for key in ("added_tokens", "extra_special_tokens", "additional_special_tokens"):
                if isinstance(settings.get(key), list):
                    settings[key] = [one for one in settings[key] if token not in (one, _text(one))]
        write_json(folder / name, settings)


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else None
