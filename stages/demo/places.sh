#!/usr/bin/env bash
# What teaches a model places: the paper's method beside dense supervision, finer tokens, Dual Cross-Attention and windows, with equal minutes
# of training. Called by `make places`.
#
#   bash stages/demo/places.sh demo         every row at the demo's size, for an hour on 2 cores
#   bash stages/demo/places.sh smoke        every row in two steps, to see that everything runs
#   ROWS="paper dense" bash stages/demo/places.sh demo      these rows alone
#
# Data and language model are the demo's; they are made where `make demo` did not. `paper` has no masks and the mixer; every other row is `dense`,
# which is the demo's own configuration, with one thing changed. Steps are such that all train about as long as `dense`, by the time of a step
# on 2 cores; the table has the minutes that they took.
set -euo pipefail

size=${1:-demo}
known="paper dense no_attention no_windows finer"
case "$size" in # studies, the steps of stage 0, then those of the rows in stage 1, then of stages 2 and 3
  demo) name=places studies=3000; steps=(800 6350 2400 2890 2620 2400 60); language=(1500 1000) ;;
  smoke) name=places-smoke studies=24; steps=(4 2 2 2 2 2 2); language=(2 2); LAUNCHER=python ;;
  *) echo "places.sh: the choices are demo or smoke, not '$size'" >&2; exit 2 ;;
esac
outputs=${OUTPUTS:-outputs}
source stages/demo/steps.sh
choose_rows "$known"

root=$outputs/$size config=stages/configs/demo
foundation "$studies" "${steps[0]}"
language_model=$root/language_model root=$outputs/$name

projector=() # options of stage 2

# row NAME STEPS STEPS3 OPTIONS...: stages 1 to 3 and their evaluations; options are those of stage 1
row() {
  local row=$1 count=$2 answers=$3 after=$after; shift 3 # the next row rests on the foundation, not on this one
  [[ " $ROWS " == *" $row "* ]] || return 0
  train "$row" stage1_siglip "$row" "$count" "$@"
  train "$row-stage2" stage2_projector "$row/stage2" "${steps[6]}" --clip "$root/$row" --language-model "$language_model" "${projector[@]}"
  train "$row-stage3" stage3_lora "$row/stage3" "$answers" --model "$root/$row/stage2"
  evaluate "$row-retrieval" retrieval "$row" "$row/eval/retrieval"
  evaluate "$row-vqa" vqa "$row/model" "$row/eval/vqa"
  evaluate "$row-report" report_gen "$row/model" "$row/eval/report"
  [ "$row" = paper ] || evaluate "$row-segmentation" segmentation "$row/segmenter" "$row/eval/segmentation"
}

no_windows=(--encoder-options '{"blocks":[1,1,2,1],"widths":[16,32,64,128,256],"stem_layers":2,"stem_stride":2,"layer_scale":0.1}')

projector=(--projector mixer --position-embedding false)
row paper "${steps[1]}" "${language[0]}" --dense-weight 0 "${no_windows[@]}"
projector=()
row dense "${steps[2]}" "${language[0]}"
row no_attention "${steps[3]}" "${language[0]}" --dual-cross-attention false
row no_windows "${steps[4]}" "${language[0]}" "${no_windows[@]}"
projector=(--image-levels -3 -1)
row finer "${steps[5]}" "${language[1]}"

python stages/demo/places.py --root "$root"
