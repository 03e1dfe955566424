"""Segmentation: train a decoder on the encoder of a stage-1 model to draw what prompts name.

    med3dvlm train segmentation --config demo/segmentation
    med3dvlm train segmentation --config smoke/segmentation --dual-cross-attention false

Writes a Med3DSegmenter with its processor. Started again, it continues from the last whole checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from med3dvlm.checkpoints import load_clip, load_segmenter, model_type
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.features import fingerprint, report_features
from med3dvlm.datasets.mask_prompts import MaskCollator, MaskDataset, MaskPrompts
from med3dvlm.datasets.store import same_preprocessing
from med3dvlm.models.clip import Med3DCLIP
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.models.segmentation import Med3DSegmenter, Med3DSegmenterConfig, Med3DSegmenterOutput
from med3dvlm.processes import together
from med3dvlm.records import Study
from med3dvlm.training.arguments import ImageArguments
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.run import finish, run_training, save_final, train_only
from med3dvlm.training.trainer import StageTrainer

CONTRAST_ONLY = ("clip.image_projection.", "clip.text_projection.", "clip.logit_")  # get no gradient from masks


@dataclass
class DecoderArguments:
    """Settings of decoder and prompts, for this stage and for stage 1 with a dense loss."""

    decoder_widths: str = field(
        default="", metadata={"help": "channels of the decoder, from the stem's grid to the coarsest, as 32,32,64,128"}
    )
    embedding_dim: int = field(default=64, metadata={"help": "width in which voxels and prompts are compared"})
    embedding_stride: int = field(
        default=1, metadata={"help": "voxels that one embedding spans along an axis; it divides the stem's stride"}
    )
    dual_cross_attention: bool = field(default=True, metadata={"help": "let skip connections attend to each other"})
    attention_level: int = field(
        default=2, metadata={"help": "output of the encoder, 0 for the stem, on whose grid skip connections attend"}
    )
    attention_heads: int = field(default=4, metadata={"help": "heads of the skip connections' spatial attention"})
    segmentation_loss: str = field(default="dice_balanced_ce", metadata={"help": "dice_balanced_ce, dice_ce or dice_focal"})
    presence_weight: float = field(default=0.1, metadata={"help": "weight of the loss of whether a finding is present"})
    token_levels: list[int] = field(
        default_factory=list,
        metadata={"help": "outputs of the encoder, -1 the last, whose tokens learn too what lies in their cells (deep supervision)"},
    )
    token_weight: float = field(default=1.0, metadata={"help": "weight of the loss of token_levels beside that of masks"})
    prompts: int = field(default=6, metadata={"help": "prompts a study, at most"})
    prompt_structures: int = field(default=1, metadata={"help": "how many of the prompts name a structure, such as an organ"})
    prompt_sentences: float = field(default=0.3, metadata={"help": "share of findings asked for by the report's sentence about them"})
    prompt_sides: float = field(default=0.3, metadata={"help": "share of findings asked for with their side, and for the other side too"})
    prompt_places: float = field(
        default=0.0,
        metadata={"help": "share of findings asked for once more with their place, and for another; for places that exclude each other"},
    )

    @property
    def decoder(self) -> dict[str, Any]:
        """Return the settings of Med3DSegmenterConfig.

        Raises:
            ValueError: `decoder_widths` are not whole numbers.
        """
        names = ("embedding_dim", "embedding_stride", "dual_cross_attention", "attention_level", "attention_heads", "segmentation_loss")
        try:
            widths = [int(width) for width in str(self.decoder_widths).split(",") if width.strip()]
        except ValueError:
            raise ValueError(f"decoder_widths is {self.decoder_widths!r} but must be whole numbers, as 32,32,64,128") from None
        return {name: getattr(self, name) for name in (*names, "presence_weight", "token_levels", "token_weight")} | {
            "decoder_widths": widths or None
        }

    @property
    def drawn(self) -> dict[str, Any]:
        """Return the settings of MaskPrompts."""
        return {
            "count": self.prompts,
            "structures": self.prompt_structures,
            "sentences": self.prompt_sentences,
            "sides": self.prompt_sides,
            "places": self.prompt_places,
        }


@dataclass
class SegmentationArguments(DecoderArguments, ImageArguments):
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    clip: str = field(
        default="", metadata={"help": "output of stage 1 or of the CT-CLIP path, or of this stage, to go on from its decoder"}
    )
    train_encoder: bool = field(
        default=True, metadata={"help": "train the vision encoder too; the CLIP inside then no longer matches reports"}
    )
    train_text: bool = field(default=False, metadata={"help": "train the text encoder too"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_features and self.train_text:
            raise ValueError(
                "cache_features does not go with a text encoder that trains; pass --cache-features false or --train-text false"
            )


class SegmentationTrainer(StageTrainer):
    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(moved_masks(inputs, inputs, self))

    def validation_loss(self) -> float:
        """Return the mean loss over the validation studies."""
        losses, numbers = [], []
        for batch, rows in self.validation_batches():
            masks = batch.pop("masks")
            output = self.model(**batch)
            asked = torch.arange(masks.shape[1], device=masks.device) < batch["counts"][:, None]
            for row in range(len(rows)):
                one = Med3DSegmenterOutput(logits=output.logits[row : row + 1], presence=output.presence[row : row + 1])
                losses.append(self.model.loss(one, masks[row : row + 1], asked[row : row + 1]))
            numbers += rows
        gathered, order = self.accelerator.gather((torch.stack(losses), torch.tensor(numbers, device=self.args.device)))
        return float(gathered[order >= 0].mean())


def moved_masks(inputs: dict[str, Any], prompts: dict[str, Any], trainer: StageTrainer) -> dict[str, Any]:
    """Return the inputs with masks that are moved as their augmented volumes are."""
    keys = inputs.get("augmentation_keys")
    if keys is not None and "masks" in prompts:
        device = trainer.args.device
        dataset: Any = trainer.train_dataset
        prompts["masks"] = dataset.augmentation.move_masks(prompts["masks"].to(device), keys)
    return inputs


def keep_features(prompts: MaskPrompts, studies: list[Study], folder: Path, clip: Med3DCLIP, processor: Med3DCLIPProcessor) -> None:
    """Compute a frozen text encoder's features of all prompts once, and keep them on disk."""
    texts = prompts.texts(studies)
    features: Tensor = report_features(folder, clip, processor, texts)
    prompts.features = dict(zip(texts, features, strict=True))


def train_segmenter_only(model: Med3DSegmenter, arguments: SegmentationArguments) -> None:
    """Freeze what gets no gradient from masks, and the encoders that the settings keep as they are."""
    frozen = CONTRAST_ONLY + (() if arguments.train_text else ("clip.text_encoder.",))
    frozen += () if arguments.train_encoder else ("clip.vision_encoder.",)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train_only(model, lambda name: name in learning and not name.startswith(frozen))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(SegmentationArguments, argv)
    if not arguments.clip:
        raise ValueError("--clip is missing; name the output of stage 1")
    data = arguments.open_data()
    rows = MaskDataset(data, arguments.train_split, arguments.seed, Augmentation.read(arguments.augmentation), **arguments.drawn)

    torch.manual_seed(arguments.seed)
    goes_on = together(model_type, arguments.clip) == Med3DSegmenterConfig.model_type
    load: Callable[..., tuple[Any, Any]] = load_segmenter if goes_on else load_clip
    loaded, processor = together(load, arguments.clip, dtype=arguments.weights_dtype)
    started_from = {"clip": fingerprint(loaded)}
    same_preprocessing(processor.image_processor, data)
    model = loaded if isinstance(loaded, Med3DSegmenter) else Med3DSegmenter.from_clip(loaded, **arguments.decoder)
    train_segmenter_only(model, arguments)

    validation = MaskDataset(data, arguments.validation_split, arguments.seed, **arguments.drawn) if arguments.validates else None
    if arguments.cache_features:
        model.eval()
        for each in (rows, validation):
            if each is not None:
                keep_features(each.prompts, each.studies, data.folder / "features", model.clip, processor)

    trainer = SegmentationTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=MaskCollator(processor),
        processing_class=processor,
    )
    run_training(trainer, arguments, str(data.summary["fingerprint"]), **started_from)
    save_final(trainer)
    finish()
