"""Stage 1: vision encoder and text encoder learn from pairs of volume and report (Med3DVLM paper, section 3.2.1).

    deepspeed stages/stage1_siglip.py --config stages/configs/demo/stage1_siglip.yaml
    python stages/stage1_siglip.py --config stages/configs/smoke/stage1_siglip.yaml --learning-rate 1e-3

Writes a Med3DCLIP with its tokenizer and VolumeProcessor. Started again, it continues from the last whole checkpoint.
"""

from collections.abc import Sequence

from med3dvlm.training.arguments import parse_arguments
from med3dvlm.training.contrastive import ContrastiveArguments, train_contrastive


def main(argv: Sequence[str] | None = None) -> None:
    train_contrastive(parse_arguments(ContrastiveArguments, argv))
