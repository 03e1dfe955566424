"""Shared by stage 1 and the CT-CLIP path: train a Med3DCLIP on pairs of volume and report."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoModel, AutoTokenizer, BertConfig, BertTokenizer, PretrainedConfig, PreTrainedModel

from med3dvlm.checkpoints import configuration_of
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.features import fingerprint, report_features
from med3dvlm.datasets.mask_prompts import PromptedPairCollator, PromptedPairDataset
from med3dvlm.datasets.torch import PairCollator, PairDataset
from med3dvlm.models.clip import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.models.clip_processor import Med3DCLIPProcessor
from med3dvlm.processes import together
from med3dvlm.training.arguments import ImageArguments
from med3dvlm.training.dense import DenselySupervisedCLIP, save_both
from med3dvlm.training.grad_cache import backward_in_parts, split_pairs
from med3dvlm.training.run import finish, run_training, save_final, train_only
from med3dvlm.training.segmentation import DecoderArguments, keep_features, moved_masks
from med3dvlm.training.state import whole
from med3dvlm.training.trainer import StageTrainer

logger = logging.getLogger(__name__)

NEW = "new"


@dataclass
class ContrastiveArguments(DecoderArguments, ImageArguments):
    train_split: str = field(default="train", metadata={"help": "split to learn from; CT-RATE has train and train_fixed"})
    encoder: str = field(default="dcformer_small", metadata={"help": "see `med3dvlm encoders`"})
    encoder_options: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": "overrides of the encoder's arguments, as JSON"}
    )
    image_stages: int = field(default=1, metadata={"help": "last stages of the encoder that are pooled"})
    image_pooling: str = field(default="mean", metadata={"help": "mean, or frames as CT-CLIP's own encoder has it"})
    text_encoder: str = field(
        default="medicalai/ClinicalBERT", metadata={"help": "directory, hub id, package:NAME, or new: a BERT without pretraining"}
    )
    text_options: dict | str | None = field(  # type: ignore[type-arg]
        default=None, metadata={"help": "overrides of the text encoder's configuration, as JSON"}
    )
    text_pooling: str = field(default="cls", metadata={"help": "cls or mean"})
    train_text: bool = field(default=True, metadata={"help": "train the text encoder too, as the papers do"})
    max_text_length: int = field(default=512, metadata={"help": "tokens of a report"})
    sentences: int | None = field(
        default=None, metadata={"help": "pair a volume also with 1 to so many sentences of its report, drawn anew in every epoch"}
    )
    projection_dim: int = field(default=768, metadata={"help": "width of the common space"})
    projection_bias: bool = field(
        default=True, metadata={"help": "whether the projections into the common space have a bias; CT-CLIP's have none"}
    )
    loss: str = field(default="siglip", metadata={"help": "siglip or clip"})
    logit_scale: float | None = field(default=None, metadata={"help": "initial log temperature"})
    logit_bias: float | None = field(default=None, metadata={"help": "initial bias"})
    train_temperature: bool = field(default=True, metadata={"help": "false keeps the temperature as it is at the start"})
    chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "volumes that go through the encoders at a time, twice: gradients of the whole batch at the memory of so many (GradCache); "
            "batch norm sees so many, too"
        },
    )
    dense_weight: float = field(
        default=0.0, metadata={"help": "weight of a loss of masks for prompts beside that of pairs; its decoder is saved in segmenter/"}
    )

    dense_studies: int | None = field(
        default=None,
        metadata={"help": "studies of a batch whose masks are decoded (default: all); the tokens of all studies learn from them"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.encoder_options = _options("encoder_options", self.encoder_options, '{"stem_stride": 2}')
        self.text_options = _options("text_options", self.text_options, '{"num_hidden_layers": 2}')
        if self.sentences is not None and self.cache_features:
            raise ValueError(
                "sentences does not go with cache_features, which reads a report once and whole; pass --cache-features false or leave it out"
            )
        if self.text_encoder == NEW and not self.train_text:
            raise ValueError("a new text encoder has to learn, but train_text is false; pass --train-text true or name a pretrained one")
        if self.chunk_size is not None and self.deepspeed:
            raise ValueError(
                "chunk_size does not go with DeepSpeed, which reduces gradients at every backward pass; leave --deepspeed out and start several "
                "processes by torchrun"
            )
        if self.chunk_size is not None:
            self.ddp_find_unused_parameters = False  # every weight has a gradient, the temperature from outside of the model's forward
        if self.chunk_size is not None and self.dense_weight:
            raise ValueError("chunk_size does not go with dense_weight, whose loss needs more than embeddings; leave one of them out")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps} but must be 1, as each part of an accumulated batch would be "
                "contrasted with itself alone; raise per_device_train_batch_size, with chunk_size or gradient_checkpointing true where memory is "
                "short, or start more processes"
            )


def _options(name: str, value: Any, example: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} {value!r} is not valid JSON ({error}); write '{example}'") from None
    if not isinstance(value, (dict, type(None))):
        raise ValueError(f"{name} is {value!r} but must hold settings by name; write '{example}'")
    least = 1 if name == "encoder_options" else 0  # every whole number of an encoder's is a size or a count
    for option, numbers in (value or {}).items():
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if (type(number) is int and number < least) or (type(number) is float and not 0 <= number < math.inf):
                raise ValueError(f"{name}: {option} is {numbers} but must be at least {least}")
    return value


class ContrastiveTrainer(StageTrainer):
    args: ContrastiveArguments

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._prepare_inputs(moved_masks(inputs, inputs.get("prompts", {}), self))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Train as the Trainer does; with `chunk_size` the encoders see a part of the batch at a time."""
        if self.args.chunk_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        parts = split_pairs(self._prepare_inputs(inputs), self.args.chunk_size)

        def backward(number: int, compute: Callable[[], torch.Tensor]) -> None:
            last = number == len(parts) - 1  # processes exchange what all parts have added up
            with nullcontext() if last else self.accelerator.no_sync(model), self.compute_loss_context_manager():
                self.accelerator.backward(compute())

        loss = backward_in_parts(self.model, parts, lambda part: model(**part, return_loss=False), backward)
        return self.finite(loss)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if isinstance(self.model, DenselySupervisedCLIP):
            save_both(self.model, Path(str(output_dir)), state_dict, self.processing_class)
        else:
            super()._save(output_dir, state_dict)

    def validation_loss(self) -> float:
        """Return the mean loss over the validation pairs in their order, in equal parts of the training's whole batch at most."""
        images, texts, numbers = [], [], []
        clip = getattr(self.model, "clip", self.model)
        for batch, rows in self.validation_batches():
            output = clip(**batch, return_loss=False)
            images.append(output.image_embeds)
            texts.append(output.text_embeds)
            numbers += rows
        gathered = self.accelerator.gather((torch.cat(images), torch.cat(texts), torch.tensor(numbers, device=self.args.device)))
        image_embeds, text_embeds, order = gathered
        kept = order.argsort()[(order < 0).sum() :]
        parts = -(-len(kept) // (self.args.train_batch_size * self.args.world_size))
        with whole(clip.logit_scale, clip.logit_bias):
            losses = [clip.contrast(image_embeds[part], text_embeds[part], gather=False) * len(part) for part in kept.tensor_split(parts)]
        return float(torch.stack(losses).sum() / len(kept))


def train_contrastive(arguments: ContrastiveArguments) -> None:
    """Train, and save model and processor; continues from the last whole checkpoint."""
    data = arguments.open_data()
    options: dict[str, Any] = {"augmentation": Augmentation.read(arguments.augmentation), "sentences": arguments.sentences}
    dense = arguments.dense_weight > 0
    pairs = (
        PromptedPairDataset(data, arguments.train_split, arguments.seed, drawn=arguments.drawn, **options)
        if dense
        else PairDataset(data, arguments.train_split, arguments.seed, **options)
    )

    torch.manual_seed(arguments.seed)
    text_encoder, tokenizer = together(_text_side, arguments, (study.report for study in pairs.studies))
    tokenizer.model_max_length = arguments.max_text_length  # saved with the model, so that evaluation cuts texts at the same place
    config = Med3DCLIPConfig(
        encoder=arguments.encoder,
        encoder_options=arguments.encoder_options,  # type: ignore[arg-type]
        size=data.processor.size,  # type: ignore[arg-type]
        image_stages=arguments.image_stages,
        image_pooling=arguments.image_pooling,
        text_config=text_encoder.config,
        text_pooling=arguments.text_pooling,
        projection_dim=arguments.projection_dim,
        projection_bias=arguments.projection_bias,
        loss=arguments.loss,
        logit_scale=arguments.logit_scale,
        logit_bias=arguments.logit_bias,
    )
    longest = config.longest_text
    if longest is not None and arguments.max_text_length > longest:
        raise ValueError(f"max_text_length is {arguments.max_text_length} but the text encoder reads {longest} tokens; pass that at most")
    _say_how_many_are_cut([study.report for study in pairs.studies], tokenizer, arguments)
    clip = Med3DCLIP(config, text_encoder)
    model = DenselySupervisedCLIP.from_clip(clip, **arguments.decoder) if dense else clip
    frozen = (() if arguments.train_text else ("text_encoder.",)) + (() if arguments.train_temperature else ("logit_scale",))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    train_only(model, lambda name: name in learning and not name.removeprefix("clip.").startswith(frozen))
    if isinstance(model, DenselySupervisedCLIP):
        model.dense_weight, model.decoded = arguments.dense_weight, arguments.dense_studies
    processor = Med3DCLIPProcessor(data.processor, tokenizer, arguments.max_text_length)
    collator = (PromptedPairCollator if dense else PairCollator)(processor)

    if arguments.cache_features and not arguments.train_text:
        model.eval()
        reports = [study.report for study in pairs.studies]
        folder = data.folder / "features"
        pairs.text_features = report_features(folder, clip, processor, reports)
        if isinstance(pairs, PromptedPairDataset):
            keep_features(pairs.prompts, pairs.studies, folder, clip, processor)

    trainer = ContrastiveTrainer(
        model, arguments, train_dataset=pairs, data_collator=collator, processing_class=processor,
        eval_dataset=PairDataset(data, arguments.validation_split, arguments.seed) if arguments.validates else None,
    )  # fmt: skip
    run_training(trainer, arguments, str(data.summary["fingerprint"]), text_encoder=fingerprint(clip.text_encoder))
    save_final(trainer)
    finish()


def _say_how_many_are_cut(reports: Sequence[str], tokenizer: Any, arguments: ContrastiveArguments) -> None:
    limit = arguments.max_text_length
    special = tokenizer.num_special_tokens_to_add()
    long = [report for report in reports if len(report.encode()) + special > limit]  # a text's bytes are never fewer than its tokens
    lengths = [len(ids) for ids in tokenizer(long, verbose=False)["input_ids"]] if long else []
    cut = sum(length > limit for length in lengths)
    if cut and arguments.process_index == 0:
        logger.warning(
            "%d of the %d reports in split %s are cut at max_text_length %d tokens, so their end, where the impression often stands, is not read; "
            "the longest has %d tokens",
            cut, len(reports), arguments.train_split, limit, max(lengths),
        )  # fmt: skip


def common_words(texts: Iterable[str], size: int) -> dict[str, int]:
    """Return a vocabulary for BertTokenizer: its special tokens, every character of the texts, and their commonest words, token -> id.

    The trainer of WordPiece would give another one each time: it orders characters and breaks ties by the seed of a hash.
    """
    empty = BertTokenizer()
    backend, counts = empty.backend_tokenizer, Counter[str]()
    for text in texts:
        counts.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    characters = sorted(set("".join(counts)))
    fixed = [*sorted(empty.get_vocab(), key=empty.get_vocab().__getitem__), *characters, *(f"##{character}" for character in characters)]
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return {token: number for number, token in enumerate([*fixed, *words[: max(size - len(fixed), 0)]])}


def _text_side(arguments: ContrastiveArguments, reports: Iterable[str]) -> tuple[PreTrainedModel, Any]:
    """Return the text encoder and its tokenizer.

    Raises:
        ValueError: no text encoder can be made with `text_options`.
    """
    options = dict(arguments.text_options or {})  # type: ignore[arg-type]
    new, path = arguments.text_encoder == NEW, ""
    if new:
        config: PretrainedConfig = BertConfig()
    else:
        path, config = configuration_of(arguments.text_encoder, "text encoder", MODEL_MAPPING)
    if unknown := sorted(option for option in options if not hasattr(config, option)):
        raise ValueError(f"text_options has {', '.join(unknown)}, which a model of type {config.model_type} does not know")
    try:
        config = type(config)(**{**config.to_dict(), **options})
        if new:
            tokenizer = BertTokenizer(common_words(reports, config.vocab_size))
            config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
            return AutoModel.from_config(config), tokenizer
        return AutoModel.from_pretrained(path, config=config, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    except Exception as error:  # each configuration checks itself in its own way
        if not options:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"no text encoder can be made with text_options {options}: {reason}") from None
