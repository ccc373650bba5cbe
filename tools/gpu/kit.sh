#!/usr/bin/env bash
# What a GPU can tell within a quarter of an hour, the most valuable first:
#   heads      train exit heads at scale              (8 minutes)
#   exactness  plain against PPSD, rows against rows  (2 minutes)
#   step       a stage's step of an 8B-shaped model   (2 minutes)
#
#   tools/gpu/kit.sh [--device cuda|cpu] [--tiny] [--out DIR] [--minutes M] [--model M]
#                    [--prompts FILE] [--only rows|reference|decoding] PART…
#   tools/gpu/kit.sh pack [--limit MiB] PROMPTS…      before: what has to travel, in parts; a dry run
#   tools/gpu/kit.sh receive N                        there: keep part N; the last one checks the hash
#
# Results are JSON files, and heads as parts of one tar file, in DIR. A part that fails or runs out
# of its time leaves what it has and does not stop the next.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
KEPT=${KEPT:-/tmp/ppsd-gpu} # where received parts are kept between calls
case "${1:-}" in
  -h | --help) sed -n '2,13p' "$0" && exit 0 ;;
  pack | receive) exec "$PYTHON" tools/gpu/travel.py --kept "$KEPT" "$@" ;;
esac

device=cuda out=runs/gpu-results minutes=8 common=() parts=() only=()
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2 && shift ;;
    --out) out=$2 && shift ;;
    --minutes) minutes=$2 && shift ;;
    --model) MODEL=$2 && shift ;;
    --prompts) PROMPTS=$2 && shift ;;
    --only) only+=(--only "$2") && shift ;;
    --tiny) common+=(--tiny) ;;
    heads | exactness | step) parts+=("$1") ;;
    *) echo "kit.sh: unknown word $1; parts are heads, exactness and step" >&2 && exit 2 ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || { sed -n '2,13p' "$0" >&2 && exit 2; }
mkdir -p "$out"
if [ -d "$KEPT/wheels" ] && [ ! -d "$KEPT/site" ]; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$KEPT/site" "$KEPT"/wheels/*.whl
fi
export PYTHONPATH="$PYTHONPATH:$KEPT/site"
[ -n "${MODEL:-}" ] || MODEL=$(ls "$KEPT"/*.gguf 2>/dev/null | head -1)
model=()
[ -z "$MODEL" ] || model=(--model "$MODEL")
status=0
for part in "${parts[@]}"; do
  case "$part" in
    heads)
      limit=$(awk "BEGIN {print int($minutes * 60 + 45)}")
      words=(run --minutes "$minutes" --out "$out" --work "${WORK:-/tmp/ppsd-gpu-work}"
        "${model[@]}" ${PROMPTS:-"$KEPT"/prompts*.jsonl}) ;;
    exactness) limit=${EXACTNESS_SECONDS:-150} words=(--out "$out/exactness.json" "${model[@]}" "${only[@]}") ;;
    step) limit=150 words=(--out "$out/step.json" --profile-out "$out/profile.json") ;;
  esac
  case " ${common[*]} " in *" --tiny "*) limit=600 ;; esac
  echo "== $part, at most $limit s"
  timeout --kill-after 10 "$limit" "$PYTHON" "tools/gpu/$part.py" \
    "${words[@]}" --device "$device" "${common[@]}" || { status=$? && echo "== $part ended with $status"; }
done
exit $status
