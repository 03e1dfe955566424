"""Load LoRA adapters over their base, and merge them into it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from med3dvlm.checkpoints.hub import write_card
from med3dvlm.checkpoints.loading import load_vlm
from med3dvlm.files import DETECTOR_FILE, MODEL_CONFIGS, install_model, write_json
from med3dvlm.models.quantized import QUANTIZATION_FILE, TRAINED, require_quantization, round_to_quantized
from med3dvlm.models.vlm import Med3DVLM
from med3dvlm.models.vlm_processor import Med3DVLMProcessor

logger = logging.getLogger(__name__)

MERGED_FROM = "merged_from.json"  # beside a merged model: the folder of its adapter
POINTING_FILE = "pointing.json"  # beside the adapter of a model that learned to point: `segmentation_config`


def load_adapted(adapter: str | Path, base: str | Path | None = None) -> tuple[Any, Med3DVLMProcessor]:
    """Load a stage-3 adapter over its base, a PeftModel in evaluation mode, with the base's processor.

    Where the adapter was trained on a quantised language model, the base has the numbers of that one, in its own type; how far they lie
    from its own is logged and stands in `quantization_error` of the model.

    Args:
        base: where the base is now; None looks where it was when the adapter was trained.

    Raises:
        FileNotFoundError: the folder holds no adapter, or its base is gone.
        ValueError: it was trained on a quantised language model, and bitsandbytes is not installed.
    """
    from peft import PeftConfig, PeftModel

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter (adapter_config.json); name the output of stage 3")
    if base is None:
        base = Path(str(PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path))
        if not base.is_dir():
            raise FileNotFoundError(
                f"{adapter} was trained on the model in {base}, which is not there; name its present folder: med3dvlm merge --base FOLDER"
            )
    record = Path(adapter) / QUANTIZATION_FILE
    method = json.loads(record.read_text(encoding="utf-8-sig"))["method"] if record.is_file() else None
    require_quantization(method, TRAINED)
    model, processor = load_vlm(base)
    if (pointing := Path(adapter) / POINTING_FILE).is_file():
        processor = Med3DVLMProcessor.from_pretrained(adapter)
        if model.pointing is None:
            model.add_pointing(json.loads(pointing.read_text(encoding="utf-8-sig")))
    error = 0.0
    if method is not None:
        error = round_to_quantized(model.language_model)
        logger.warning(
            "%s was trained on a language model in %s: its linear layers take the numbers of that, which differ from their own by %.2f %%",
            adapter, method.upper(), 100 * error,
        )  # fmt: skip
    adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
    adapted.quantization_error = {method: error} if method else None
    return adapted, processor


def require_same_origin(destination: str | Path, adapter: str | Path) -> None:
    """Raise ValueError where `merge_lora` would replace a model in `destination` that was not merged from this adapter's folder."""
    destination, adapter = Path(destination), Path(adapter).resolve()
    if destination.resolve() == adapter:
        raise ValueError(f"the merged model would replace the adapter in {adapter}; name another folder for it: --merged")
    if not any((destination / name).exists() for name in MODEL_CONFIGS):
        return
    record = destination / MERGED_FROM
    source = json.loads(record.read_text(encoding="utf-8-sig"))["adapter"] if record.is_file() else None
    if source != str(adapter):
        raise ValueError(
            f"{destination} holds {f'the model merged from {source}' if source else 'a model of another origin'}, which the one of {adapter} "
            "would replace; name another folder for it, --merged, or delete that one"
        )


def merge_lora(adapter: str | Path, destination: str | Path, base: str | Path | None = None) -> Med3DVLM:
    """Merge a stage-3 adapter into its base and write the whole model to `destination`, in the place of one that is there.

    A quantised base is merged dequantised: the result computes what was trained, up to rounding in its own type.
    What the stage found of its training data (out_of_distribution.safetensors) goes with it; an older one that is there goes away.

    Args:
        base: see `load_adapted`.
    """
    adapter = Path(adapter)
    adapted, processor = load_adapted(adapter, base)
    errors = adapted.quantization_error
    merged: Med3DVLM = adapted.merge_and_unload()
    if merged.pointing is not None:
        merged.pointing.write_token(merged.language_model)
    merged.config.language_model_source = None  # the merged model is another one
    destination = Path(destination).resolve()
    aside = destination.with_name(f".{destination.name}-merging")
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    try:
        merged.save_pretrained(aside)
        processor.save_pretrained(aside)
        if (detector := adapter / DETECTOR_FILE).is_file():
            shutil.copy(detector, aside)
        quantized = {"relative_error_of_quantized_weights": errors} if errors else {}
        write_json(aside / MERGED_FROM, {"adapter": str(adapter.resolve()), **quantized})
        write_card(aside, destination)
        install_model(aside, destination)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return merged


def verify_equal(one: PreTrainedModel, other: PreTrainedModel, inputs: dict[str, Any], tolerance: float = 1e-4) -> float:
    """Return the largest difference of two models' logits relative to their spread.

    Raises:
        ValueError: it exceeds `tolerance`.
    """
    with torch.no_grad():
        first, second = one(**inputs).logits.float(), other(**inputs).logits.float()
    difference = float((first - second).abs().max() / first.std())
    if difference > tolerance:
        raise ValueError(f"the models differ by {difference:.2e} of the logits' spread; {tolerance:.0e} is allowed")
    return difference
