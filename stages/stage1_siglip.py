"""Stage 1: vision encoder and text encoder learn from pairs of volume and report (Med3DVLM paper, section 3.2.1).

    deepspeed stages/stage1_siglip.py --config stages/configs/demo/stage1_siglip.yaml
    python stages/stage1_siglip.py --config stages/configs/smoke/stage1_siglip.yaml --learning_rate 1e-3

Writes a Med3DCLIP with its tokenizer and VolumeProcessor. Started again, it continues from the last whole checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from med3dvlm import Med3DCLIP, Med3DCLIPConfig
from med3dvlm.arguments import ImageArguments, parse_arguments
from med3dvlm.checkpoints import locate_model
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.features import fingerprint, report_features
from med3dvlm.datasets.torch import PairCollator, PairDataset
from med3dvlm.training import StageTrainer, finish, launch, run_training, save_final, train_only


@dataclass
class Stage1Arguments(ImageArguments):
    encoder: str = field(default="dcformer_small", metadata={"help": "see `med3dvlm encoders`"})
    encoder_options: dict | str | None = field(default=None, metadata={"help": "overrides of the encoder's arguments, as JSON"})
    image_stages: int = field(default=1, metadata={"help": "last stages of the encoder that are pooled"})
    text_encoder: str = field(default="medicalai/ClinicalBERT", metadata={"help": "directory, hub id, or package:NAME"})
    text_pooling: str = field(default="cls", metadata={"help": "cls or mean"})
    train_text: bool = field(default=True, metadata={"help": "train the text encoder too, as the paper does"})
    max_text_length: int = field(default=512, metadata={"help": "tokens of a report"})
    projection_dim: int = field(default=768, metadata={"help": "width of the common space"})
    loss: str = field(default="siglip", metadata={"help": "siglip or clip"})
    logit_scale: float | None = field(default=None, metadata={"help": "initial log temperature"})
    logit_bias: float | None = field(default=None, metadata={"help": "initial bias"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.encoder_options, str):
            try:
                self.encoder_options = json.loads(self.encoder_options)
            except json.JSONDecodeError as error:
                raise ValueError(f"encoder_options {self.encoder_options!r} is no JSON ({error}); write '{{\"stem_stride\": 2}}'") from None


def main() -> None:
    arguments = parse_arguments(Stage1Arguments)
    data = arguments.open_data()
    pairs = PairDataset(data, "train", arguments.seed, Augmentation.read(arguments.augmentation))

    torch.manual_seed(arguments.seed)
    text_encoder = locate_model(arguments.text_encoder)
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    tokenizer.model_max_length = arguments.max_text_length  # saved with the model, so that evaluation cuts texts at the same place
    config = Med3DCLIPConfig(
        encoder=arguments.encoder,
        encoder_options=arguments.encoder_options,
        size=data.processor.size,
        image_stages=arguments.image_stages,
        text_pooling=arguments.text_pooling,
        projection_dim=arguments.projection_dim,
        loss=arguments.loss,
        logit_scale=arguments.logit_scale,
        logit_bias=arguments.logit_bias,
    )
    model = Med3DCLIP.from_text_encoder(config, text_encoder)
    train_only(model, lambda name: arguments.train_text or not name.startswith("text_encoder."))
    collator = PairCollator(tokenizer, arguments.max_text_length)

    if arguments.cache_features and not arguments.train_text:
        model.eval()
        with arguments.main_process_first(local=False):
            reports = [study.report for study in pairs.studies]
            pairs.text_features = report_features(Path(arguments.data) / "features", model, collator, reports)

    trainer = StageTrainer(model=model, args=arguments, train_dataset=pairs, data_collator=collator, processing_class=tokenizer)
    run_training(trainer, arguments, str(data.summary["fingerprint"]), text_encoder=fingerprint(model.text_encoder))
    save_final(trainer, data.processor)
    finish()


if __name__ == "__main__":
    launch(main)
