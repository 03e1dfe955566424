# Sourced by demo.sh and ablation.sh: steps that are left out once they are finished, and trainings that continue from their last checkpoint.
# A script sets root, the folder of its run, and config, the folder of its configurations; LAUNCHER=python starts the stages without DeepSpeed.

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=${DS_ACCELERATOR:-}
[ -n "$DS_ACCELERATOR" ] || unset DS_ACCELERATOR
cpu=$(python -c 'import torch; print("" if torch.cuda.is_available() else "--use-cpu true")')

# choose_rows KNOWN: ROWS, all that are known unless the user named some
choose_rows() {
  local row
  ROWS=${ROWS:-$1}
  for row in $ROWS; do
    case " $1 " in
      *" $row "*) ;;
      *) echo "$(basename "$0"): row '$row' is unknown; known: $1" >&2; exit 2 ;;
    esac
  done
}

after= # the mark of the step before, on which the next one rests

# step NAME PRODUCT COMMAND...: print and run it, and note its seconds and peak memory
#
# It is left out if it left its mark after the step before it did and its product is there. So where a step runs, all after it run again;
# what they find done for the same data, weights and settings they leave as it is.
step() {
  local step=$1 product=$2 mark=$root/done/$1; shift 2
  if [ -f "$mark" ] && [ -e "$product" ] && ! [ "$mark" -ot "$after" ]; then
    echo "== $step: done before"
  else
    mkdir -p "$root/done"
    rm -f "$mark"
    printf '\n== %s\n$%s\n' "$step" "$(printf ' %q' "$@")"
    python stages/demo/timed.py "$root/seconds.jsonl" "$step" "$@"
    touch "$mark"
  fi
  after=$mark
}

# train STEP STAGE FOLDER STEPS OPTIONS...: a stage on $data, its output in the folder below the root; of stage 3 the whole model in `model` beside it
train() {
  local name=$1 stage=$2 output=$root/$3 count=$4 model=$root/$3; shift 4
  if [ "$stage" = stage3_lora ]; then model=$(dirname "$output")/model; set -- --merged "$model" "$@"; fi
  # shellcheck disable=SC2086
  step "$name" "$model/config.json" ${LAUNCHER:-deepspeed} "stages/$stage.py" --config "$config/$stage.yaml" --data "$data" --output-dir "$output" --max-steps "$count" "$@" $cpu
}

# evaluate STEP SCRIPT MODEL FOLDER OPTIONS...: a script of eval/ on a model and $data; model and output below the root
evaluate() {
  step "$1" "$root/$4/scores.json" python "eval/$2.py" --model "$root/$3" --data "$data" --output "$root/$4" "${@:5}"
}

# foundation STUDIES STEPS: phantoms in $root, prepared in $data, and a language model of so many steps, none for 0
foundation() {
  data=$root/prepared
  step phantoms "$root/phantoms/M3D_Cap/M3D_Cap.json" med3dvlm phantom "$root/phantoms" --studies "$1" --seed 0
  step prepare "$data/summary.json" med3dvlm prepare m3d "$root/phantoms" "$data" --recipe m3d --size 24,48,48
  [ "$2" = 0 ] || train stage0 stage0_language_model language_model "$2"
}
