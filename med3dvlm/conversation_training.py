"""What stages 2 and 3 share: a Med3DVLM learns from conversations about volumes."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from med3dvlm.arguments import ImageArguments
from med3dvlm.datasets.augmentation import Augmentation
from med3dvlm.datasets.features import fingerprint, frozen_features
from med3dvlm.datasets.store import PreparedData, same_preprocessing
from med3dvlm.datasets.torch import LOSS_WEIGHTINGS, ROWS, ConversationCollator, ConversationDataset, load_volumes
from med3dvlm.processing import Med3DVLMProcessor
from med3dvlm.vlm import Med3DVLM


@dataclass
class ConversationArguments(ImageArguments):
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
            "help": "what counts alike in the loss: token (a report of 200 tokens has 40 times the weight of an answer of 5) or conversation "
            "(the tokens of a report, or of an answer, share the weight of one)"
        },
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of a conversation, image tokens included; longer ones are cut"})
    max_row_length: int = field(
        default=4096, metadata={"help": "tokens of a row of several conversations; a study with more takes several rows"}
    )
    reports: float = field(
        default=1.0, metadata={"help": "share of rows with the report as an answer; of studies, where a row is one conversation"}
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("rows", ROWS), ("loss_weighting", LOSS_WEIGHTINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r} but must be {' or '.join(known)}")
        if self.rows == "conversation" and self.follow_ups:
            raise ValueError(f"follow_ups is {self.follow_ups} but must be 0 where a row is one conversation; pass --follow_ups 0")
        if self.max_row_length < self.max_length:
            raise ValueError(f"max_row_length is {self.max_row_length} but must be at least max_length, {self.max_length}; raise it")


def conversations(
    arguments: ConversationArguments, data: PreparedData, model: Med3DVLM, processor: Med3DVLMProcessor, yes_no: bool
) -> tuple[ConversationDataset, ConversationCollator]:
    """Training data of stages 2 and 3; with `cache_features` the frozen encoder runs once over the training split.

    Raises:
        ValueError: the data was prepared in another way than the model takes it, the encoder that is to run once is to be trained, or
            the model cannot take several conversations in a row.
    """
    same_preprocessing(processor.image_processor, data)
    if arguments.cache_features and any(parameter.requires_grad for parameter in model.vision_encoder.parameters()):
        raise ValueError("with cache_features the vision encoder runs once and would not be trained; pass --cache_features false")
    if arguments.rows == "study" and (reason := model.unpackable) is not None:
        raise ValueError(
            f"rows is 'study', but several conversations cannot share a row: {reason}; pass --rows conversation --follow_ups 0"
        )
    augmentation = Augmentation.read(arguments.augmentation)
    if arguments.cache_features and augmentation is not None:
        raise ValueError("with cache_features every volume is seen once, unchanged; pass --cache_features false or --augmentation none")
    dataset = ConversationDataset(
        data, "train", yes_no, reports=arguments.reports, closed=arguments.closed, follow_ups=arguments.follow_ups, seed=arguments.seed,
        augmentation=augmentation, rows=arguments.rows,
    )  # fmt: skip
    dataset.limit_rows(processor, arguments.max_length, arguments.max_row_length)
    if arguments.cache_features:
        name = fingerprint(model.vision_encoder, str(data.summary["fingerprint"]))
        places = {study.id: index for index, study in enumerate(dataset.studies)}

        def compute(rows: range) -> tuple[Tensor, Tensor]:
            return model.encode_image(load_volumes(data, [dataset.studies[row] for row in rows], arguments.device))

        with arguments.main_process_first(local=False):
            model.eval().to(arguments.device)
            path = Path(arguments.data) / "features" / f"image-{name}.safetensors"
            low, high = frozen_features(path, len(dataset.studies), compute, description="image features")
        dataset.features = lambda study: (low[places[study.id]], high[places[study.id]])
    return dataset, ConversationCollator(processor, arguments.max_length, arguments.loss_weighting)
