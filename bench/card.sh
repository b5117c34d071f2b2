#!/usr/bin/env bash
# The first day on a card: what to run when a GPU is at hand, in the order of what is learned first. docs/card.md explains it.
#   bench/card.sh [--out DIR] [--model MODEL] [--seconds N] [PIECE ...]
#                                    runs the pieces (default: all) that have not finished, each for N seconds or so
#   bench/card.sh --again PIECE ...  runs these pieces whether they have finished or not
#   bench/card.sh --dry              runs all of them on the CPU with tiny sizes: tests the scripts, measures nothing
set -uo pipefail
pieces="tests doctor-bfloat16 doctor-float32 host tune bench training-small training-large memory beside peers variants"
usage() {
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    echo "pieces: $pieces" >&2
    exit 2
}
dry='' out='' model='' again='' wanted='' seconds=240
while [ $# -gt 0 ]; do
    case $1 in
    --dry) dry=--dry ;;
    --again) again=yes ;;
    --out | --model | --seconds)
        [ $# -gt 1 ] || usage
        declare "${1#--}=$2"
        shift
        ;;
    *)
        [[ $1 != -* && " $pieces " == *" $1 "* ]] || usage
        wanted+=" $1"
        ;;
    esac
    shift
done
[[ -z $again || -n $wanted ]] && [[ $seconds =~ ^[1-9][0-9]*$ ]] || usage

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${out:=card${dry:+-dry}}" || exit 2
out=$(cd "$out" && pwd)
[ ! -e "$model" ] || model=$(cd "$(dirname "$model")" && pwd)/$(basename "$model")
cd "$root" || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TQDM_MININTERVAL=10 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export PLOPFAST_CACHE="$out/cache" # what `tune` finds is in force in later pieces, and nowhere else

run() { # PIECE: its command
    local kernels=(tests/gpu) on=() few=() needed=(transformers) brief=$((seconds / 4 + 1))
    if [ -n "$dry" ]; then
        export CUDA_VISIBLE_DEVICES='' HIP_VISIBLE_DEVICES='' OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=0
        kernels=(tests/gpu/test_expand.py -k 33) on=(--device cpu) few=(--max-steps 2 --repeats 1) brief=1
    fi
    case $1 in
    tests) [ -z "$dry" ] || export TRITON_INTERPRET=1 ;;
    doctor-* | memory | beside | peers)
        [ "$1" != peers ] || needed+=(peft accelerate)
        $python bench/card_gpu.py "${needed[@]}" || return 0
        ;;&
    doctor-* | peers)
        [ -z "$dry" ] || { model=$out/tiny && $python bench/card_tiny.py "$model"; }
        [ -z "$model" ] || on+=(--model "$model")
        ;;
    esac
    case $1 in
    tests) $python -m pytest -p no:cacheprovider --confcutdir=tests/gpu "${kernels[@]}" ;;
    doctor-*) $python -m plopfast doctor --dtype "${1#doctor-}" --seconds $brief "${on[@]}" ;;
    host) $python bench/card_profile.py --out "$out/host.json" --seconds "$seconds" $dry ;;
    tune) $python -m plopfast bench --tune --seconds "$seconds" $dry ;;
    bench) $python -m plopfast bench --out "$out/timings" --overwrite --seconds "$seconds" $dry ;;
    training-*) $python bench/card_training.py --size "${1#training-}" --seconds "$seconds" --out "$out/$1.json" $dry ;;
    memory | beside) $python bench/card_$1.py --out "$out/$1.json" --seconds "$seconds" $dry ;;
    peers) $python -m plopfast bench --train --out "$out/peers" --overwrite --seconds "$seconds" "${on[@]}" "${few[@]}" ;;
    variants) $python bench/card_variants.py --out "$out/variants.json" --seconds "$seconds" $dry ;;
    esac
}

if [ -z "$dry" ] && ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "card.sh: no GPU that torch can use; --dry tests the scripts on the CPU" >&2
    exit 2
fi
failed=''
for piece in ${wanted:-$pieces}; do
    kept=$out/$piece.txt
    if [[ -f $kept && -z $again ]]; then
        echo "== $piece: finished before, see $kept"
        continue
    fi
    echo "== $piece"
    began=$SECONDS
    rm -f "$kept" "$out/$piece.failed"
    if (run "$piece") 2>&1 | tee "$out/$piece.part"; then
        mv "$out/$piece.part" "$kept"
        echo "== $piece: $((SECONDS - began)) s"
    else
        mv "$out/$piece.part" "$out/$piece.failed"
        echo "== $piece: FAILED after $((SECONDS - began)) s, see $out/$piece.failed"
        failed+=" $piece"
    fi
done
$python bench/card_table.py "$out" | tee "$out/table.txt"
[ -z "$failed" ] || { echo "card.sh: failed:$failed" >&2 && exit 1; }
