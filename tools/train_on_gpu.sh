#!/usr/bin/env bash
# Train the tiny family on one GPU, in pieces for a machine that is lent for minutes at a time.
#
#   tools/train_on_gpu.sh OUT [PART...]        parts: vae clip t5 mmdit controlnet detector (default: mmdit controlnet)
#
# A call works for MINUTES (default 9) at most and goes on where the last one stopped: first the data, by PROCESSES at once, then each part.
# It leaves the weights so far in OUT, in files of at most 15 MB; cat OUT/sd3_tiny.safetensors.* puts one together again.
# Ends with 0 when all is done, and with 75 when there is more to do.
set -euo pipefail
out=$(realpath -m "${1:?name the folder that the weights go to}")
cd "$(dirname "$0")/.."
shift
parts=("$@")
((${#parts[@]})) || parts=(mmdit controlnet)
python=${PYTHON:-python3} folder=${FOLDER:-runs/gpu} scenes=${SCENES:-150000} processes=${PROCESSES:-$(nproc)}
ends=$((SECONDS + 60 * ${MINUTES:-9}))
declare -A options=([mmdit]="--batch ${BATCH:-512} --steps ${STEPS:-16000}" [controlnet]="--batch 128 --steps ${STEPS:-1500}")

minutes_left() {
    local left=$((ends - SECONDS))
    printf '%d.%02d' $((left / 60)) $((left % 60 * 100 / 60))
}

finish() { # STATUS: hand over the weights that there are
    mkdir -p "$out"
    for file in "$folder"/model/*.safetensors; do
        [ ! -e "$file" ] || split -b 15m -d "$file" "$out/$(basename "$file")."
    done
    exit "$1"
}

for i in $(seq "$processes"); do
    OMP_NUM_THREADS=1 timeout $((ends - SECONDS)) \
        "$python" -m minisd3 prepare --folder "$folder" --scenes "$scenes" --share "$i" "$processes" 2>/dev/null &
done
for job in $(jobs -p); do wait "$job" || finish 75; done
echo "data: $SECONDS s"

for part in "${parts[@]}"; do
    # shellcheck disable=SC2086  # the options are words
    "$python" -m minisd3 train "$part" --folder "$folder" --scenes "$scenes" --minutes "$(minutes_left)" ${options[$part]:-} || finish 75
    echo "$part: done after $SECONDS s of this call"
done
finish 0
