#!/usr/bin/env bash
# Tables 5 to 8 of the Med3DVLM paper on phantoms: encoders and losses by retrieval, projectors by reports and answers. Called by `make ablation`.
#
#   bash stages/demo/ablation.sh demo        every row at the demo's size, for an hour or so on 2 cores
#   bash stages/demo/ablation.sh smoke       every row in two steps, to see that everything runs
#   ROWS="vit3d_clip dcformer_clip" bash stages/demo/ablation.sh demo      these rows alone
#
# Data and language model are the demo's; they are made where `make demo` did not. The projectors stand behind the encoder of dcformer_siglip.
# Every command is printed before it runs. A step that was finished is left out the next time; a training continues from its last checkpoint.
set -euo pipefail

size=${1:-demo}
known="vit3d_clip vit3d_siglip dcformer_clip dcformer_siglip mlp low_high_mlp mixer_1 mixer_2 spatial_pooling"
case "$size" in # studies, then the steps of stages 0 to 3; the first two as in demo.sh
  demo) name=ablation; rows=ablation; studies=3000; steps=(800 400 60 860) ;;
  smoke) name=ablation-smoke; rows=smoke; studies=24; steps=(4 2 2 2); LAUNCHER=python ;;
  *) echo "ablation.sh: the choices are demo or smoke, not '$size'" >&2; exit 2 ;;
esac
outputs=${OUTPUTS:-outputs}
source stages/demo/steps.sh
choose_rows "$known"

root=$outputs/$size config=stages/configs/$size
foundation "$studies" "${steps[0]}"
language_model=$root/language_model root=$outputs/$name config=stages/configs/$rows

# encoder ROW OPTIONS...: a row of Table 5
encoder() {
  local row=$1 after=$after; shift # the next row rests on the foundation, not on this one
  [[ " $ROWS " == *" $row "* ]] || return 0
  train "$row" stage1_siglip "$row" "${steps[1]}" "$@"
  evaluate "$row-retrieval" retrieval "$row" "$row/eval/retrieval"
}

# projector ROW OPTIONS...: a row of Tables 6 to 8
projector() {
  local row=$1 after=$root/done/dcformer_siglip; shift
  [[ " $ROWS " == *" $row "* ]] || return 0
  train "$row-stage2" stage2_projector "$row/stage2" "${steps[2]}" --clip "$root/dcformer_siglip" --language-model "$language_model" "$@"
  train "$row-stage3" stage3_lora "$row/stage3" "${steps[3]}" --model "$root/$row/stage2"
  evaluate "$row-vqa" vqa "$row/model" "$row/eval/vqa"
  evaluate "$row-report" report_gen "$row/model" "$row/eval/report"
}

# as many parameters as the demo's DCFormer, at the size of its volumes: 0.91 and 0.90 million
vit3d=(--encoder vit3d_naive --encoder-options '{"patch":[4,8,8],"width":132,"depth":4,"heads":4}')

# row, and what it changes in the configurations
encoder vit3d_clip "${vit3d[@]}" --loss clip
encoder vit3d_siglip "${vit3d[@]}" --loss siglip
encoder dcformer_clip --loss clip
encoder dcformer_siglip --loss siglip
projector mlp --projector mlp
projector low_high_mlp --projector low_high_mlp
projector mixer_1 --projector mixer --projector-depth 1
projector mixer_2 --projector mixer --projector-depth 2
projector spatial_pooling --projector spatial_pooling

python stages/demo/ablation.py --root "$root"
