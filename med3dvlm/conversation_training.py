"""What stages 2 and 3 share: a Med3DVLM learns from conversations about volumes."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from med3dvlm.arguments import ImageArguments
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.features import fingerprint, frozen_features
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import ConversationCollator, ConversationDataset, load_volumes
from med3dvlm.processing import Med3DVLMProcessor
from med3dvlm.vlm import Med3DVLM


@dataclass
class ConversationArguments(ImageArguments):
    max_length: int = field(default=1024, metadata={"help": "tokens of a conversation, image tokens included"})
    reports: float = field(default=1.0, metadata={"help": "share of rows with the report as an answer"})
    closed: float = field(default=0.5, metadata={"help": "share of rows with a question whose choices are spelled out"})
    follow_ups: float = field(default=0.25, metadata={"help": "share of rows with two questions in one conversation"})


def conversations(
    arguments: ConversationArguments, data: PreparedData, model: Med3DVLM, processor: Med3DVLMProcessor, yes_no: bool
) -> tuple[ConversationDataset, ConversationCollator]:
    """Training data of stages 2 and 3; with `cache_features` the frozen encoder runs once over the training split.

    Raises:
        ValueError: the data was prepared in another way than the model takes it, or the encoder that is to run once is to be trained.
    """
    same_preprocessing(processor.image_processor, data)
    if arguments.cache_features and any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):
        raise ValueError("with cache_features the vision encoder runs once and would not be trained; pass --cache_features false")
    augmentation = Augmentation.read(arguments.augmentation)
    if arguments.cache_features and augmentation is not None:
        raise ValueError("with cache_features every volume is seen once, unchanged; pass --cache_features false or --augmentation none")
    dataset = ConversationDataset(
        data, "train", yes_no, reports=arguments.reports, closed=arguments.closed, follow_ups=arguments.follow_ups, seed=arguments.seed,
        augmentation=augmentation,
    )  # fmt: skip
    if arguments.cache_features:
        name = fingerprint(model.vision_encoder, str(data.summary["fingerprint"]))
        places = {study.id: index for index, study in enumerate(dataset.studies)}

        def compute(rows: range) -> tuple[Tensor, Tensor]:
            return model.encode_image(load_volumes(data, [dataset.studies[row] for row in rows], arguments.device))

        with arguments.main_process_first(local=False):
            model.eval().to(arguments.device)
            path = Path(arguments.data) / "features" / f"image-{name}.safetensors"
            low, high = frozen_features(path, len(dataset), compute, description="image features")
        dataset.features = lambda study: (low[places[study.id]], high[places[study.id]])
    return dataset, ConversationCollator(processor, arguments.max_length)
