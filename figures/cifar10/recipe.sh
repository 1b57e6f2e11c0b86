#!/usr/bin/env bash
# Every command behind the CIFAR10 results, in order. A step can be stopped at any time and called again: it goes on
# where it was, and what is finished answers from the store.
#
#   recipe.sh STEP...    bench quick full more adapters budget notebooks
#
#   DATA      where the images are: empty for torchvision's layout of CIFAR10, or "data=folder data_root=FOLDER"
#   SETTINGS  further settings, key=value with spaces between them: to rehearse at toy size
#   SEEDS     of cifar10-quick ("0 1 2")
#   SAMPLES   images a class of the full run, of which "more" draws three times as many (5000)
#   MINUTES   the length of a slice of a long run (9)
#   OUT       where the benchmarks and the closing lines of runs go (this folder)
set -euo pipefail
out=${OUT:-$(cd "$(dirname "$0")" && pwd)}
words="${DATA:-} ${SETTINGS:-}"
set=()
for word in $words; do set+=(--set "$word"); done

# A run in slices until it is finished, then the proof that it forgot nothing.
finish() {
    local said=""
    until [[ $said == *'"finished": true'* ]]; do
        said=$(funlora run "${set[@]}" "$@" --minutes "${MINUTES:-9}" --json | tail -n 1)
        echo "$said"
    done
    grep -qsF "$said" "$out/runs.jsonl" || echo "$said" >>"$out/runs.jsonl"
    run=$(python -c 'import json, sys; print(json.loads(sys.argv[1])["run"])' "$said")
    funlora verify "$run" | tail -n 1
}

for step in "$@"; do
    echo "== $step"
    case $step in
    bench) # images a second, and the ratios to torchcfm's U-Net
        for precision in fp32 bf16; do
            funlora bench cifar10 "${set[@]}" --set precision=$precision --json >"$out/bench-$precision.json"
        done
        ;;
    quick) # the small network, whole protocol
        for seed in ${SEEDS:-0 1 2}; do finish cifar10-quick --seed "$seed"; done
        ;;
    full) # the paper's network and budget
        finish cifar10
        funlora quality "$run" --draws 20 >"$out/quality.txt"
        funlora report "$run"
        ;;
    more) # the same generator, three times the samples
        finish cifar10 --set samples_per_class=$((3 * ${SAMPLES:-5000}))
        ;;
    adapters) # compared adapters and starts, on the base of the full run
        funlora sweep cifar10 "${set[@]}" --tables methods,functions --seeds 1 --row funlora --row vanilla-mul \
            --row scale-shift --row label-embedding --row "cosine, learned, literal start" | tee "$out/adapters.txt"
        ;;
    budget) # Table VII: steps and images a class
        funlora notebooks cifar10 --only 05 --set "settings=$words" --set "fixed=rk4 2, rk4 3, rk4 4, rk4 5, rk4 6" \
            --set "multiples=1, 2, 3" --set "adaptive=dopri5 1e-2, dopri5-each 1e-2" --set "cheap=rk4 2" --set "dear=rk4 6" --set repeats=1
        ;;
    notebooks) # every table and figure of the small network, one seed
        funlora notebooks cifar10-quick --set "settings=$words" --set seeds=1
        ;;
    *)
        echo "recipe.sh: unknown step '$step': accepted are bench quick full more adapters budget notebooks" >&2
        exit 2
        ;;
    esac
done
