"""The CT-CLIP path: an image-text model of chest CT learns from the scans and reports of CT-RATE (DCFormer paper, Methods; arXiv 2403.17834).

    med3dvlm train ct_clip --config demo/ct_clip
    med3dvlm train ct_clip --config smoke/ct_clip --encoder vit3d_naive

It is stage 1's training with other settings by default: CXR-BERT, CLIP's loss, a common space of 512. Writes a Med3DCLIP with its tokenizer and
VolumeProcessor, for `med3dvlm evaluate zero_shot`, `linear_probe` and `retrieval`, and for `med3dvlm index`. Started again, it continues from the
last whole checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from med3dvlm.training.contrastive import ContrastiveArguments, train_contrastive
from med3dvlm.training.parsing import parse_arguments


@dataclass
class CTCLIPArguments(ContrastiveArguments):
    encoder: str = field(default="dcformer_tiny", metadata={"help": "see `med3dvlm encoders`"})
    text_encoder: str = field(
        default="microsoft/BiomedVLP-CXR-BERT-specialized",
        metadata={"help": "directory, hub id, package:NAME, or new: a BERT without pretraining"},
    )
    projection_dim: int = field(default=512, metadata={"help": "width of the common space"})
    loss: str = field(default="clip", metadata={"help": "siglip or clip"})


def main(argv: Sequence[str] | None = None) -> None:
    train_contrastive(parse_arguments(CTCLIPArguments, argv))
