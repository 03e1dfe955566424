"""Stage 2: the projector learns to put the image into the language model's words; everything else is frozen (paper, section 3.2.2).

    med3dvlm train stage2 --config demo/stage2_projector
    med3dvlm train stage2 --config smoke/stage2_projector --projector low_high_mlp

Writes a Med3DVLM with its processor. Started again, it continues from the last whole checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from med3dvlm import Med3DVLM, Med3DVLMProcessor
from med3dvlm.checkpoints import load_clip, load_language_model
from med3dvlm.datasets.features import fingerprint
from med3dvlm.datasets.torch import load_volumes
from med3dvlm.processes import together
from med3dvlm.training.language import ConversationArguments, ConversationTrainer, conversations, hold_quantized
from med3dvlm.training.parsing import parse_arguments
from med3dvlm.training.run import finish, run_training, save_final, train_only


@dataclass
class Stage2Arguments(ConversationArguments):
    clip: str = field(default="", metadata={"help": "output of stage 1"})
    language_model: str = field(default="Qwen/Qwen2.5-7B-Instruct", metadata={"help": "directory, hub id, or package:NAME"})
    projector: str = field(default="mixer", metadata={"help": "mlp, low_high_mlp, mixer or spatial_pooling"})
    standardise: bool = field(
        default=False, metadata={"help": "start the projector from standardised features: learns faster in short runs"}
    )
    projector_depth: int = field(default=2, metadata={"help": "layers of the mixer"})
    image_levels: list[int] = field(
        default_factory=lambda: [-2, -1],
        metadata={
            "help": "the encoder's two outputs that the projector takes, counted from the last, -1: the paper's are -2 -1, finer ones -3 -2"
        },
    )
    position_embedding: bool = field(default=False, metadata={"help": "add a learned position to every token before the projector"})
    save_language_model: bool = field(
        default=True, metadata={"help": "false saves the place and fingerprint of the language model instead of a copy"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize and self.save_language_model:
            raise ValueError(
                "save_language_model is true, but quantize holds no whole language model to save; pass --save-language-model false"
            )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(Stage2Arguments, argv)
    if not arguments.clip:
        raise ValueError("--clip is missing; name the output of stage 1")
    data = arguments.open_data()

    torch.manual_seed(arguments.seed)
    clip, pairs = together(load_clip, arguments.clip, dtype=arguments.weights_dtype)
    language_model, tokenizer = together(load_language_model, arguments.language_model, arguments.weights_dtype)
    started_from = {"clip": fingerprint(clip), "language_model": fingerprint(language_model)}
    place = arguments.language_model
    place = str(Path(place).resolve()) if Path(place).is_dir() else place
    source = {"place": place, "dtype": str(arguments.weights_dtype).removeprefix("torch."), "fingerprint": started_from["language_model"]}
    processor = Med3DVLMProcessor(pairs.image_processor, tokenizer)
    model = Med3DVLM.from_parts(
        clip,
        language_model,
        processor.image_token_id,
        projector=arguments.projector,
        projector_depth=arguments.projector_depth,
        image_levels=arguments.image_levels,
        position_embedding=arguments.position_embedding,
    )
    processor.num_image_tokens = model.config.num_image_tokens
    train_only(model, lambda name: name.startswith("projector."))
    hold_quantized(model, arguments)
    if not arguments.save_language_model:
        model.config.language_model_source = source

    parts = conversations(arguments, data, model, processor, yes_no=False)
    if arguments.standardise:
        with torch.no_grad():
            low, high = model.eval().cpu().encode_image(load_volumes(data, data.studies("train")[:64]))
            model.projector.standardise(low.float(), high.float())
    trainer = ConversationTrainer(model, arguments, **parts, processing_class=processor)
    run_training(trainer, arguments, str(data.summary["fingerprint"]), **started_from)
    save_final(trainer)
    finish()
