"""Shared by stages 2 and 3: train a Med3DVLM on conversations about volumes."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.conversations import LOSS_WEIGHTINGS, ConversationCollator, ConversationDataset, ConversationOptions
from med3dvlm.datasets.features import SharedFeatures, fingerprint
from med3dvlm.datasets.mask_prompts import require_masks
from med3dvlm.datasets.pointing import PointingAnswers
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.models.quantized import TRAINED, quantize, require_quantization
from med3dvlm.models.vlm import Med3DVLM, count_items
from med3dvlm.models.vlm_processor import IGNORED, Med3DVLMProcessor
from med3dvlm.records import Study
from med3dvlm.training.arguments import ImageArguments
from med3dvlm.training.segmentation import moved_masks
from med3dvlm.training.trainer import StageTrainer

logger = logging.getLogger(__name__)


@dataclass
class ConversationArguments(ImageArguments):
    knows_lengths = True
    rows: str = field(
        default="study",
        metadata={
            "help": "what a row is: study (a volume with all conversations about it, so that it is encoded and read once for all) or "
            "conversation (a volume with one of them, as the papers count their batches and epochs)"
        },
    )
    loss_weighting: str = field(
        default="token",
        metadata={
            "help": "what has equal weight in the loss: token (a report of 200 tokens has 40 times the weight of an answer of 5) or conversation "
            "(the tokens of a report, or of an answer, share the weight of one)"
        },
    )
    max_length: int = field(
        default=1024, metadata={"help": "tokens of a conversation, image tokens included; what is longer is cut and counted"}
    )
    max_row_length: int = field(
        default=4096, metadata={"help": "tokens of a row of several conversations; a study with more takes several rows"}
    )
    reports: float = field(
        default=1.0,
        metadata={
            "help": "share of rows with the report as an answer (all, where a study has no question); of studies, where a row is one "
            "conversation"
        },
    )
    closed: float = field(
        default=0.5,
        metadata={
            "help": "share of rows with a question whose choices are spelled out; of questions with choices, where a row is one conversation"
        },
    )
    follow_ups: float = field(
        default=0.25, metadata={"help": "share of rows with two questions in one conversation; 0 where a row is one conversation"}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "hold the linear layers of the language model in 4 bits while training: nf4 (QLoRA)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_quantization(self.quantize, TRAINED)
        if self.quantize and self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise ValueError("quantize does not go with ZeRO-3, which would cut 4-bit weights into parts; pass --deepspeed deepspeed/zero2")
        self.conversation_options(yes_no=True)
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting is {self.loss_weighting!r} but must be {' or '.join(LOSS_WEIGHTINGS)}")
        if self.max_row_length < self.max_length:
            raise ValueError(f"max_row_length is {self.max_row_length} but must be at least max_length, {self.max_length}; raise it")

    def conversation_options(self, yes_no: bool) -> ConversationOptions:
        """Return which conversations the data sets hold; raises ValueError where these settings contradict each other."""
        return ConversationOptions(yes_no, self.reports, self.closed, self.follow_ups, self.rows)


class ConversationTrainer(StageTrainer):
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Return the divisor of the step's loss, over all processes and parts of an accumulated batch; None at the end of an epoch."""
        if not batch_samples:
            return None
        items = torch.stack([count_items(batch) for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(items)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = super()._prepare_inputs(moved_masks(inputs, inputs, self))
        if "masks" in batch:
            arguments = self.args
            batch["num_rows_in_batch"] = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        return batch

    def validation_loss(self) -> float:
        """Return the loss over all labelled tokens, or all conversations, of the validation rows, and that of masks over all rows."""
        total = torch.zeros(4, device=self.args.device)  # of the two losses and of what each is divided by
        for batch, numbers in self.validation_batches():
            real = torch.tensor(numbers) >= 0
            batch["labels"][~real] = IGNORED
            output = self.model(**batch, num_items_in_batch=1)
            masks = output.get("mask_losses", torch.zeros(len(real)))
            language = output.get("language_loss", output.loss)
            parts = (language, count_items(batch), masks[real.to(masks.device)].sum(), real.sum())
            total += torch.stack([part.float().to(total.device) for part in parts])
        words, items, masks, rows = self.accelerator.reduce(total)
        return float(words / items + masks / rows)


def hold_quantized(model: Med3DVLM, arguments: ConversationArguments) -> None:
    """Quantise the language model to 4 bits, where the settings ask for it; LoRA may be added to it then."""
    if arguments.quantize is not None:
        quantize(model.language_model, arguments.device)
        model.__dict__["is_loaded_in_4bit"] = True  # PEFT asks for it


def limit_lengths(rows: ConversationDataset, split: str, processor: Med3DVLMProcessor, arguments: Any) -> None:
    """Keep rows to `max_row_length`, and say how much of the split `max_length` cuts.

    Raises:
        ValueError: a question leaves no room for its answer, or the chat template does not show where the assistant's words stand.
    """
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    processor.encode(turn, image=False)
    if arguments.follow_ups:
        try:
            processor.encode(turn + turn, image=False)
        except ValueError as error:
            raise ValueError(f"{error}; or pass --follow-ups 0, so that no conversation has two questions") from None
    rows.limit_rows(processor, arguments.max_length, arguments.max_row_length)
    for kind, (cut, count, needed) in rows.count_cut(processor, arguments.max_length).items():
        if cut and arguments.process_index == 0:
            logger.warning(
                "%d of the %d %s in split %s do not fit into max_length %d: their last words are left out, and with them the token that ends an "
                "answer, so that the model does not learn to stop there; --max-length %d leaves all of them whole",
                cut, count, kind, split, arguments.max_length, needed,
            )  # fmt: skip


def conversations(
    arguments: ConversationArguments, data: PreparedData, model: Med3DVLM, processor: Med3DVLMProcessor, yes_no: bool
) -> dict[str, Any]:
    """Return the arguments of a ConversationTrainer: `train_dataset`, `eval_dataset` (None unless it validates) and `data_collator`.

    With `cache_features` the frozen encoder runs once over each split.

    Raises:
        ValueError: the data was prepared in another way than the model takes it, the encoder that is to run once is to be trained, or
            the model cannot take several conversations in a row.
    """
    same_preprocessing(processor.image_processor, data)
    if arguments.cache_features and any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):
        raise ValueError("with cache_features the vision encoder runs once and would not be trained; pass --cache-features false")
    if arguments.rows == "study" and (reason := model.packing_obstacle) is not None:
        raise ValueError(
            f"rows is 'study', but several conversations cannot share a row: {reason}; pass --rows conversation --follow-ups 0"
        )
    answers = None if model.pointing is None else PointingAnswers(data)
    if answers is not None:
        require_masks(data, "train", data.studies("train"))
    if arguments.cache_features and answers is not None:
        raise ValueError("with --segmenter the encoder's stages and the volumes themselves are needed; pass --cache-features false")
    augmentation = Augmentation.read(arguments.augmentation)
    if arguments.cache_features and augmentation is not None:
        raise ValueError("with cache_features every volume is seen once, unchanged; pass --cache-features false or --augmentation none")

    def dataset(split: str, augmentation: Augmentation | None) -> ConversationDataset:
        rows = ConversationDataset(data, split, arguments.conversation_options(yes_no), arguments.seed, augmentation, answers=answers)
        limit_lengths(rows, split, processor, arguments)
        if arguments.cache_features:
            rows.features = _cached_features(arguments, data, model, split)
        return rows

    return {
        "train_dataset": dataset("train", augmentation),
        "eval_dataset": dataset(arguments.validation_split, None) if arguments.validates else None,
        "data_collator": ConversationCollator(processor, arguments.max_length, arguments.loss_weighting),
    }


def _cached_features(
    arguments: ConversationArguments, data: PreparedData, model: Med3DVLM, split: str
) -> Callable[[Study], tuple[Tensor, ...]]:
    """Return a function that gives the image features of a study of the split; all processes compute them, once, and keep them beside the
    data.
    """
    studies = data.studies(split)
    places = {study.id: index for index, study in enumerate(studies)}

    def compute(rows: range) -> tuple[Tensor, Tensor]:
        return model.encode_image(load_volumes(data, [studies[row] for row in rows], arguments.device))

    model.eval().to(arguments.device)
    name = fingerprint(model.vision_encoder, str(data.summary["fingerprint"])) + ("" if split == "train" else f"-{split}")
    if (levels := model.config.image_levels) != [-2, -1]:
        name += f"-levels{levels[0]}{levels[1]}"
    folder = data.folder / "features" / f"image-{name}"
    features = SharedFeatures(folder, len(studies), compute, description=f"image features, {split}")
    return partial(_features_of, places, features)  # workers may have to be sent it: no lambda


def _features_of(places: Mapping[str, int], features: SharedFeatures, study: Study) -> tuple[Tensor, ...]:
    return features[places[study.id]]
