#!/bin/sh
# MD-Net at the demo's sizes on rated photographs: benchmarks/real_faces.sh DATA [OUTPUT] [SCALE]
#
# DATA is a table of ratings (or a folder with ratings.csv) that has a column split; SCALE is that of its ratings,
# "1 10" by default. OUTPUT gets the checkpoint face.safetensors, the bundles fp32 and int8, and the figures. Nothing of
# the test list is learnt from. The frozen encoder is the packaged demo's, which has seen drawn faces alone. Another
# list is scored by `mdnet evaluate OUTPUT/face.safetensors --data TABLE`. docs/real-faces.md has what came out, and how
# long each step took.
set -eu
data=${1:?usage: benchmarks/real_faces.sh DATA [OUTPUT] [SCALE]}
out=${2:-real-faces}
scale=${3:-1 10}
mkdir -p "$out"
step() {
    printf '%s %s\n' "$(date +%H:%M:%S)" "$*"
    "$@"
}
step mdnet pretrain --preset demo --data "$data" --views 8 --epochs 30 --seed 0 -o "$out/start.safetensors"
# shellcheck disable=SC2086 # the scale is two words
step mdnet train --init "$out/start.safetensors" --data "$data" --scale $scale --views 8 --linear-probe \
    --epochs 0 --seed 0 --cache "$out/features" -o "$out/face.safetensors"
step mdnet evaluate "$out/face.safetensors" --data "$data" --cache "$out/features" --json "$out/checkpoint.json"
step mdnet-export build --checkpoint "$out/face.safetensors" -o "$out/fp32"
step mdnet-export build --checkpoint "$out/face.safetensors" --precision int8 --calib "$data" -o "$out/int8"
for precision in fp32 int8; do
    step mdnet evaluate "$out/$precision" --data "$data" --json "$out/$precision.json"
done
step mdnet-export verify "$out/int8" --against "$out/fp32" --images "$data" --num-images 10000
date +%H:%M:%S
