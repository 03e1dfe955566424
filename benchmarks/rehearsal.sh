#!/usr/bin/env bash
# The paper's recipes at their real shapes on a machine without a GPU, before eight of them are rented: `make rehearsal`, at most 40 minutes.
#
# 128x256x256 voxels, DCFormer-small, ClinicalBERT's and Qwen2.5-7B's configurations with random weights and few layers; stages/configs/paper
# through deepspeed, ZeRO-2, bfloat16, with only the sizes of the runs overridden; then merge, conversion there and back, a question, evaluations.
# Nothing useful is learned. Every command is printed before it runs; started again, it goes on after the last finished step.
#
#   bash benchmarks/rehearsal.sh --layers 4 --steps 20      more than the two layers and eight steps of the default
#   bash benchmarks/rehearsal.sh --tiny --size 32,64,64 --detail 0.5      to see that the script itself runs: two minutes
set -euo pipefail

layers=2 steps=8 processes=2 size=128,256,256 detail=3.2 tiny=()
while [ $# -gt 0 ]; do
  case "$1" in
    --tiny) tiny=(--tiny); shift ;;
    --layers | --steps | --processes | --size | --detail) printf -v "${1#--}" %s "${2:?$1 needs a value}"; shift 2 ;;
    *) echo "rehearsal.sh: unknown: $1; known: --tiny, --layers N, --steps N, --processes N, --size D,H,W, --detail X" >&2; exit 2 ;;
  esac
done
root=${OUTPUTS:-outputs}/rehearsal
config=stages/configs/paper
LAUNCHER="deepspeed --num_accelerators $processes"
source stages/demo/steps.sh
models="python benchmarks/rehearsal_models.py"
data=$root/prepared

# write NAME FOLDER COMMAND...: a step that writes a model to a folder which must not exist yet
write() {
  if ! [ -f "$root/done/$1" ] || [ "$root/done/$1" -ot "$after" ]; then rm -rf "$2"; fi
  step "$1" "$2/config.json" "${@:3}"
}

# stage NAME SCRIPT OPTIONS...: a training that saves halfway and at the end; its checkpoints are of no use once it is finished
#
# Without workers: one that is forked at an epoch's begin shares the memory that a training on the CPU has filled, until that is written again.
stage() {
  OMP_NUM_THREADS=$threads train "$1" "$2" "$1" "$steps" --save-steps $(((steps + 1) / 2)) --logging-steps 1 \
    --include-num-input-tokens-seen true --dataloader-num-workers 0 "${@:3}"
  rm -rf "$root/$1"/checkpoint-*
}

mkdir -p "$root"
trap 'python benchmarks/rehearsal_report.py --root "$root"' EXIT
planned=$($models plan "$root" --layers "$layers" --steps "$steps" --processes "$processes" | tail -n 1)
read -r layers steps <<<"${planned:-$layers $steps}"
threads=$(($(nproc) / processes > 1 ? $(nproc) / processes : 1))

step phantoms "$root/phantoms/M3D_Cap/M3D_Cap.json" med3dvlm phantom "$root/phantoms" --studies 30 --seed 0 --detail "$detail"
step prepare "$data/summary.json" med3dvlm prepare m3d "$root/phantoms" "$data" --recipe m3d --size "$size"
write text_encoder "$root/text_encoder" $models text_encoder "$data" "$root/text_encoder" "${tiny[@]}"
write language_model "$root/language_model" $models language_model "$data" "$root/language_model" --layers "$layers" "${tiny[@]}"
stage stage1 stage1_siglip --text-encoder "$root/text_encoder" --per-device-train-batch-size 2
stage stage2 stage2_projector --clip "$root/stage1" --language-model "$root/language_model" --per-device-train-batch-size 1
stage stage3 stage3_lora --model "$root/stage2" --per-device-train-batch-size 1
write merge "$root/merged" med3dvlm merge "$root/stage3" "$root/merged"
step merge_same "$root" $models same "$root/model" "$root/merged"
for model in stage1 merged; do
  text=() && [ "$model" = merged ] || text=(--text-encoder "$root/text_encoder")
  write "publish_$model" "$root/published_$model" $models published "$root/$model" "$root/published_$model"
  write "convert_$model" "$root/converted_$model" med3dvlm convert "$root/published_$model" "$root/converted_$model" --verify \
    "${text[@]}"
  step "same_$model" "$root" $models same "$root/$model" "$root/converted_$model"
done
scan=$(find "$root/phantoms/M3D_Cap" -name '*.nii.gz' | sort | head -n 1)
for model in merged converted_merged; do
  step "ask_$model" "$root" med3dvlm ask "$root/$model" "$scan" "Which plane is this scan?" --max-new-tokens 8
done
evaluate retrieval retrieval stage1 eval/retrieval --pools 4 --limit 4 --batch-size 2
evaluate report report_gen merged eval/report --clip "$root/stage1" --limit 2 --batch-size 2 --max-new-tokens 8
