#!/usr/bin/env bash
# The CT-CLIP path once: chest phantoms in CT-RATE's layout, preparation, training, zero-shot detection, linear probe, retrieval, a search.
# Called by `make demo-ct-clip` and `make compare-encoders`.
#
#   bash stages/demo/ct_clip.sh demo          one DCFormer
#   bash stages/demo/ct_clip.sh encoders      six families of encoders with equal steps, seed and data, and Tables 1 to 3 of the DCFormer paper
#   bash stages/demo/ct_clip.sh smoke         everything in a few steps, to see that it runs
#   ROWS="dcformer vit3d" bash stages/demo/ct_clip.sh encoders      these families alone
#
# Every command is printed before it runs. A step that was finished is left out the next time; a training continues from its last checkpoint.
set -euo pipefail

size=${1:-demo}
known="dcformer convnext3d poolformer3d transunet3d vit3d ctvit"
config=stages/configs/demo
case "$size" in # volumes and training steps
  demo) name=demo-ct-clip; volumes=1600 steps=900 ;;
  encoders) name=encoders volumes=1600 steps=250 ;;
  smoke) name=demo-ct-clip-smoke config=stages/configs/smoke volumes=40 steps=2; LAUNCHER=python ;;
  *) echo "ct_clip.sh: the choices are demo, encoders or smoke, not '$size'" >&2; exit 2 ;;
esac
outputs=${OUTPUTS:-outputs}
source stages/demo/steps.sh
choose_rows "$known"

# detect ROW FOLDER OPTIONS...: a model of the path and its three evaluations, below a folder of the root
detect() {
  local row=$1 folder=$2; shift 2
  local valid=(--split valid_fixed)
  train "${row}clip" ct_clip "${folder}clip" "$steps" "$@"
  evaluate "${row}zero_shot" zero_shot "${folder}clip" "${folder}eval/zero_shot" "${valid[@]}"
  evaluate "${row}linear_probe" linear_probe "${folder}clip" "${folder}eval/linear_probe" "${valid[@]}"
  evaluate "${row}retrieval" retrieval "${folder}clip" "${folder}eval/retrieval" "${valid[@]}" --pools "$pool" --ks 1,5,10,50,100
}

root=$outputs/$name
[ "$size" != encoders ] || root=$outputs/demo-ct-clip # their data is the demo's
data=$root/prepared pool=100
[ "$size" != smoke ] || pool=8
step phantoms "$root/phantoms/multi_abnormality_labels/valid_predicted_labels.csv" \
  med3dvlm phantom "$root/phantoms" --layout ct_rate --studies "$volumes" --seed 0
step prepare "$data/summary.json" \
  med3dvlm prepare ct_rate "$root/phantoms" "$data" --recipe ct_rate --size 40,64,48 --target-spacing 7,5.4,5.4

if [ "$size" != encoders ]; then
  detect "" ""
  step index "$root/index" med3dvlm index "$root/clip" "$data" "$root/index"
  python stages/demo/summary_ct_clip.py --root "$root" --name "$name"
  printf '\n$ med3dvlm search %s --text "Emphysema is present." --top 3\n' "$root/index"
  med3dvlm search "$root/index" --text "Emphysema is present." --top 3
  printf '\nResults: %s/report.md and summary.json.\n' "$root"
  exit
fi

root=$outputs/$name foundation=$after runs=()
# about a million parameters each at these volumes: what each family changes in the configuration
options_of() {
  case $1 in
    dcformer) ;;
    convnext3d) echo --encoder convnext3d_nano --encoder-options '{"blocks":[1,1,2,1],"widths":[16,32,64,112,192],"stem_stride":2,"layer_scale":0.1}' ;;
    poolformer3d) echo --encoder poolformer3d_nano --encoder-options '{"blocks":[1,1,2,1],"widths":[16,32,64,128,256],"stem_stride":2,"layer_scale":0.1}' ;;
    transunet3d) echo --encoder transunet3d_naive --encoder-options '{"blocks":[1,1,2,1],"widths":[16,24,32,64,128],"head_width":32,"stem_stride":2}' ;;
    vit3d) echo --encoder vit3d_naive --encoder-options '{"patch":[4,8,8],"width":128,"depth":4,"heads":4}' ;;
    ctvit) echo --encoder ctvit --encoder-options '{"dim":104,"codebook_size":512,"patch":[4,8,8],"spatial_depth":2,"temporal_depth":2,"heads":4}' --image-stages 1 ;;
  esac
}
for row in $ROWS; do
  after=$foundation # a row rests on the data, not on the row before
  read -ra options <<<"$(options_of "$row")"
  detect "$row-" "$row/" "${options[@]}"
  runs+=("$root/$row")
done
python eval/compare.py --published "${runs[@]}" --data-name "chest phantoms" --output "$root/published"
