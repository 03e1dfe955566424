"""Stage 1: vision encoder and text encoder learn from pairs of volume and report (Med3DVLM paper, section 3.2.1).

    med3dvlm train stage1 --config demo/stage1_siglip
    med3dvlm train stage1 --config smoke/stage1_siglip --learning-rate 1e-3

Writes a Med3DCLIP with its tokenizer and VolumeProcessor. Started again, it continues from the last whole checkpoint.
"""

from collections.abc import Sequence

from med3dvlm.training.contrastive import ContrastiveArguments, train_contrastive
from med3dvlm.training.parsing import parse_arguments


def main(argv: Sequence[str] | None = None) -> None:
    train_contrastive(parse_arguments(ContrastiveArguments, argv))
