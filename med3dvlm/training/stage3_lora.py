"""Stage 3: LoRA on every linear layer of the language model, and the projector (paper, section 3.2.3); then the merge.

    med3dvlm train stage3 --config demo/stage3_lora
    med3dvlm train stage3 --config smoke/stage3_lora --lora-rank 8
    med3dvlm train stage3 --config demo/stage3_lora --segmenter outputs/demo/stage1/segmenter --cache-features false

Writes a PEFT adapter to the output folder and the merged Med3DVLM, ready to use, to `merged`.
"""

import gc
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from med3dvlm import Med3DVLM, Med3DVLMProcessor
from med3dvlm.checkpoints import POINTING_FILE, load_adapted, load_segmenter, load_vlm, merge_lora, require_same_origin
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.store import PreparedData
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.files import write_json
from med3dvlm.inference.out_of_distribution import fit_detector, pool_features
from med3dvlm.models.pointing import POINTING_TOKEN, pointing_settings
from med3dvlm.models.quantized import QUANTIZATION_FILE
from med3dvlm.processes import together
from med3dvlm.training.language import ConversationArguments, ConversationTrainer, conversations, hold_quantized
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.run import finish, lora_targets, release, run_training, save_final

logger = logging.getLogger(__name__)


@dataclass
class Stage3Arguments(ConversationArguments):
    model: str = field(default="", metadata={"help": "output of stage 2"})
    merged: str = field(default="", metadata={"help": "folder of the merged model"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the low-rank update"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the low-rank update times its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the low-rank update"})
    also_train: list[str] = field(
        default_factory=list,
        metadata={"help": "whole modules to train too; the released script in fact trains vision_encoder, embed_tokens, lm_head"},
    )
    segmenter: str = field(
        default="", metadata={"help": "output of `train segmentation` on the model's encoder: answers learn to point with its decoder"}
    )
    mask_weight: float = field(default=1.0, metadata={"help": "weight of the loss of masks that are pointed to, beside that of words"})
    train_decoder: bool = field(default=False, metadata={"help": "train the segmenter's decoder too"})


def add_lora(base: Med3DVLM, arguments: Stage3Arguments) -> PeftModel:
    """Return the model with trainable LoRA modules, a trainable copy of the projector, and of its pointing part; everything else is frozen.

    Raises:
        ValueError: `also_train` names what is not a module, or what LoRA trains already.
    """
    targets = re.compile(lora_targets(base))
    trained = ["projector"] if base.pointing is None else ["projector", "pointing"]
    modules = [name for name, _ in base.named_modules()]
    for wanted in arguments.also_train:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise ValueError(
                f"also_train names {wanted!r}, which is not a module of the model; name a module, such as vision_encoder, embed_tokens or lm_head"
            )
        if any(targets.fullmatch(name) and name.startswith(tuple(found)) for name in modules):
            raise ValueError(f"also_train names {wanted!r}, but its layers get LoRA; leave it out")
        whole = {*trained, *arguments.also_train}
        if any(not whole.isdisjoint(name.split(".")[:-1]) for name in found):
            raise ValueError(f"also_train names {wanted!r}, which lies in a module that trains as a whole; leave it out")
    lora = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets.pattern,
        modules_to_save=[*trained, *arguments.also_train],
    )
    model = get_peft_model(base, lora)
    if base.pointing is not None and not arguments.train_decoder:
        base.pointing.head.requires_grad_(False)
    return model


def add_segmenter(base: Med3DVLM, processor: Med3DVLMProcessor, folder: str) -> str:
    """Let the model point with the decoder of a trained segmenter, and return the segmenter's fingerprint.

    Raises:
        ValueError: the model can point already, or the segmenter reads volumes by another encoder.
    """
    if base.pointing is not None:
        raise ValueError(
            "the model points already, and a new decoder would replace its own; leave --segmenter out, or name the output of stage 2"
        )
    segmenter, _ = together(load_segmenter, folder, dtype=base.dtype)
    if fingerprint(segmenter.clip.vision_encoder) != fingerprint(base.vision_encoder):
        raise ValueError(
            f"the vision encoder of the segmenter in {folder} is not that of the model, so that its decoder would misread it; make both from one: "
            "stage 2 on the output of stage 1 with --dense-weight, or a segmenter trained with --train-encoder false"
        )
    base.add_pointing(pointing_settings(segmenter.config, processor.add_pointing(POINTING_TOKEN)))
    assert base.pointing is not None
    base.pointing.head.load_state_dict(segmenter.head.state_dict())
    return fingerprint(segmenter)


class Stage3Trainer(ConversationTrainer):
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        config = self.accelerator.unwrap_model(self.model).get_base_model().config
        if not _internal_call and output_dir and self.args.should_save and config.segmentation_config is not None:
            write_json(Path(output_dir) / POINTING_FILE, config.segmentation_config)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Stage3Arguments, argv)
    if not arguments.model:
        raise ValueError("--model is missing; name the output of stage 2")
    if arguments.merged:
        together(require_same_origin, arguments.merged, str(arguments.output_dir))
    data = arguments.open_data()

    torch.manual_seed(arguments.seed)
    base, processor = together(load_vlm, Path(arguments.model).resolve(), dtype=arguments.weights_dtype)
    started_from = {"model": fingerprint(base)}
    if arguments.segmenter:
        started_from["segmenter"] = add_segmenter(base, processor, arguments.segmenter)
    hold_quantized(base, arguments)
    base.mask_weight = arguments.mask_weight
    model = add_lora(base, arguments)
    parts = conversations(arguments, data, base, processor, yes_no=True)
    trainer = Stage3Trainer(model, arguments, **parts, processing_class=processor)
    run_training(trainer, arguments, str(data.summary["fingerprint"]), **started_from)
    record_quantization(arguments)
    save_final(trainer)
    first = trainer.is_world_process_zero()
    release(trainer)
    finish()  # the other processes are done: none waits for the merge
    if not first:
        return
    del trainer, model, base, parts
    gc.collect()
    adapted, _ = load_adapted(str(arguments.output_dir))
    trained = adapted.get_base_model()
    trained.vision_encoder.to(arguments.device)
    remember_training_data(trained, data, str(arguments.output_dir))
    del adapted, trained  # the merge loads the base anew
    if arguments.merged:
        merge_lora(str(arguments.output_dir), arguments.merged)


def record_quantization(arguments: Stage3Arguments) -> None:
    """Record beside the adapter, before that is written, how the language model under it was quantised."""
    path = Path(str(arguments.output_dir)) / QUANTIZATION_FILE
    if arguments.should_save and arguments.quantize is not None:
        write_json(path, {"method": arguments.quantize, "double_quantization": True})
    elif arguments.should_save:
        path.unlink(missing_ok=True)


def remember_training_data(model: Med3DVLM, data: PreparedData, folder: str) -> None:
    """Fit the out-of-distribution detector on up to 500 scans each of the training and validation splits, and save it in the folder."""
    splits = data.summary["splits"]
    if not isinstance(splits, dict) or splits.get("train", 0) < 20 or not splits.get("validation"):
        logger.warning("fewer than 20 training scans or no validation scan: the model gets no detector of scans unlike its training data")
        return
    pooled = {}
    like = next(model.vision_encoder.parameters())
    for split in ("train", "validation"):
        studies = data.studies(split)
        batches = torch.linspace(0, len(studies) - 1, min(len(studies), 500)).round().int().split(4)
        with torch.no_grad():
            volumes = (load_volumes(data, [studies[index] for index in batch], like.device) for batch in batches)
            pooled[split] = torch.cat([pool_features(model.encode_image(batch.to(like))) for batch in volumes])
    fit_detector(pooled["train"], pooled["validation"]).save(folder)
