#!/usr/bin/env bash
# A lease of one GPU, from nothing: run from the root of a clone, nothing has to be installed but PyTorch and its friends.
#
#   lease.sh first MINUTES   for a lease of 15 or 30 minutes: checks, speed, cifar10-quick, and then the full network (30)
#                            or further seeds of cifar10-quick (15) in a process that outlives this command
#   lease.sh wait SECONDS    waits for that process, at most so long, and packs what is finished; call it again
#   lease.sh full SECONDS    what the process of its own does
#
#   KEEP      a folder on that machine's disk (/tmp/keep)       OUT   what travels back (/tmp/out)
#   ARCHIVE   CIFAR10 as folders train/<class>/*, test/<class>/* in a tar file; or DATA="data_root=FOLDER"
#   SETTINGS  further settings and TIMES "check speed quick full" in seconds: to rehearse at toy size
#   PYTHON    the interpreter (python3)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
export KEEP=${KEEP:-/tmp/keep} OUT=${OUT:-/tmp/out} PYTHONUNBUFFERED=1 FUNLORA_SAVE_SECONDS=300 CUBLAS_WORKSPACE_CONFIG=:4096:8
export FUNLORA_HOME=$KEEP/runs PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} SETTINGS=${SETTINGS:-} PYTHON=${PYTHON:-python3}
mkdir -p "$KEEP" "$OUT"
export FUNLORA_WITHOUT=$(cat "$KEEP/without" 2>/dev/null)
words=()
for word in ${DATA:-} $SETTINGS; do words+=(--set "$word"); done

funlora() { # SECONDS ARGUMENTS...
    timeout -s TERM "$1" "$PYTHON" -m funlora_lab "${@:2}"
}

case $1 in
first)
    read -r check speed quick full <<<"${TIMES:-$([[ $2 -ge 30 ]] && echo "60 110 250 1000" || echo "40 60 270 330")}"
    begun=$SECONDS
    if [[ -n ${ARCHIVE:-} ]]; then
        mkdir -p "$KEEP/data" && "$PYTHON" -m tarfile -e "$ARCHIVE" "$KEEP/data" >"$KEEP/unpack.log" 2>&1 &
        export DATA="data=folder data_root=$KEEP/data"
        words+=(--set data=folder --set "data_root=$KEEP/data")
    fi
    timeout "$check" "$PYTHON" "$here/lease.py" check "$KEEP" 2>&1 | tee "$OUT/check.txt"
    export FUNLORA_WITHOUT=$(cat "$KEEP/without" 2>/dev/null)
    echo "without: ${FUNLORA_WITHOUT:-nothing}"
    timeout "$((speed + 30))" "$PYTHON" "$here/lease.py" speed "$KEEP" "$speed" 2>"$KEEP/speed.err" | tail -n 30
    cp "$KEEP/speed.jsonl" "$OUT/"
    wait
    funlora "$quick" run cifar10-quick "${words[@]}" --json 2>"$KEEP/quick.err" | tail -n 1 | tee "$OUT/quick.json"
    minutes=$2 setsid nohup bash "$here/lease.sh" full "$full" >"$KEEP/full.log" 2>&1 </dev/null &
    sleep 2
    "$PYTHON" "$here/lease.py" pack "$FUNLORA_HOME" "$OUT"
    echo "first call: $((SECONDS - begun)) s"
    ;;
full)
    rm -f "$KEEP/full.done"
    if [[ ${minutes:-30} -ge 30 ]]; then
        settings=$("$PYTHON" "$here/lease.py" plan "$KEEP/speed.jsonl" "$2") || settings=""
        echo "plan: $settings"
        for word in precision=bf16 $settings $SETTINGS; do words+=(--set "$word"); done
        said=$(funlora 3600 run cifar10 "${words[@]}" --json 2>"$KEEP/full.err" | tail -n 1)
        echo "$said"
        run=$("$PYTHON" -c 'import json, sys; print(json.loads(sys.argv[1]).get("run", ""))' "$said")
        [[ -n $run ]] && funlora 600 verify "$run" --device cuda | tail -n 1 && funlora 600 report "$run" | tail -n 1
    else
        for seed in 1 2; do
            funlora "$2" run cifar10-quick --seed "$seed" "${words[@]}" --json 2>"$KEEP/full.err" | tail -n 1
        done
    fi
    touch "$KEEP/full.done"
    ;;
wait)
    for ((i = 0; i < $2; i += 2)); do
        [[ -e $KEEP/full.done ]] && break
        sleep 2
    done
    cp "$KEEP/full.log" "$OUT/"
    tail -n 5 "$KEEP/full.log"
    "$PYTHON" "$here/lease.py" pack "$FUNLORA_HOME" "$OUT"
    ;;
*)
    echo "lease.sh: accepted are first MINUTES, wait SECONDS, full SECONDS" >&2
    exit 2
    ;;
esac
