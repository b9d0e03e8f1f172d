#!/usr/bin/env bash
# Makes every measurement that docs/performance.md lacks, on one idle GPU with 80 GB or more. Tables are printed, and
# everything is written to FOLDER. --small uses the embedded pipeline, also on a CPU, to check that the script works.
#   bash benchmarks/gpu.sh [--small] [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
small=
if [ "${1:-}" = --small ]; then small=yes && shift; fi
out=${1:-output/benchmarks}
mkdir -p "$out"

step() { # NAME MODEL ARMS [options of step.py]
    local name=$1 model=$2 arms=$3 options=("${@:4}")
    if [ -n "$small" ]; then
        model=tiny options+=(--steps 1)
        arms=$(sed -E 's/train_batch_size=[0-9]+/train_batch_size=2/g' <<<"$arms")
    fi
    echo "== $name"
    python benchmarks/step.py --model "$model" --one_by_one --json "$out/$name.json" --arms "$arms" "${options[@]}"
}

on=gradient_checkpointing=true off=gradient_checkpointing=false n=train_batch_size
python -m tiny.precision | tee "$out/precision.md"
for precision in bf16 $([ -n "$small" ] || echo fp16); do
    step "sd15-$precision" sd15 "kept-16:$off,$n=16 kept-32:$off,$n=32 recomputed-32:$on,$n=32
        compiled:$off,$n=16,torch_compile=true nhwc:$off,$n=16,channels_last=true eq13:$off,$n=16,secant=1 latent:$off,$n=16,space=latent" \
        --mixed_precision "$precision"
    step "sdxl-$precision" sdxl "kept-4:$off,$n=4 encoder-8:$on,checkpointed_blocks=encoder,$n=8
        recomputed-8:$on,$n=8 recomputed-16:$on,$n=16 compiled:$off,$n=4,torch_compile=true
        nhwc:$off,$n=4,channels_last=true eq13:$off,$n=4,secant=1 latent:$off,$n=4,space=latent" --mixed_precision "$precision"
    step "sdxl-one-pair-$precision" sdxl "cached:$on,$n=1" --mixed_precision "$precision"
    step "sd15-straightforward-$precision" sd15 "cached:$on,$n=16 pixels:pixels,$on,$n=16 straightforward:$on,$n=16" \
        --mixed_precision "$precision"
    step "sdxl-straightforward-$precision" sdxl "cached:$on,$n=4 pixels:pixels,$on,$n=4 straightforward:$on,$n=4" \
        --mixed_precision "$precision"
done
python benchmarks/memory.py | tee "$out/memory.md"
