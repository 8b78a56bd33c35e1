#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Everything that needs a GPU, in parts of under ten minutes each:
#
#   scripts/gpu_check.sh tests       the GPU's tests through torch (and C++, where they are built)
#   scripts/gpu_check.sh sanitize    compute-sanitizer's four tools on tests/cases/sanitize.json
#   scripts/gpu_check.sh bench       the published shapes beside cuBLAS and torch; rows and a picture
#   scripts/gpu_check.sh skew        uneven loads, H computed again, the low-memory order, decoding
#   scripts/gpu_check.sh profile     every launch of a step on three shapes
#   scripts/gpu_check.sh all         all of them
#
# Several parts may be named. Logs and rows go to $GPU_CHECK_DIR (build/gpu-check), and a short table
# of what passed comes last; the exit status is 1 if any part failed. Penstock with the CUDA backend,
# torch and pytest must be importable by $PYTHON (python3): `make wheel-cuda`, then install the wheel.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${GPU_CHECK_DIR:-build/gpu-check}
commit=${GPU_CHECK_COMMIT:-$(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
summary=$folder/summary.txt
failed=0

# run NAME COMMAND...: the command's output goes to NAME.log and its end to the screen.
run() {
  name=$1
  shift
  began=$(date +%s)
  if "$@" >"$folder/$name.log" 2>&1; then result=passed; else result=FAILED; failed=1; fi
  tail -n "${lines:-15}" "$folder/$name.log"
  printf '%-22s %-7s %5d s\n' "$name" "$result" "$(($(date +%s) - began))" >>"$summary"
}

bench() { "$python" -m penstock.cli bench --device cuda --commit "$commit" "$@"; }

part_tests() {
  lines=40
  run tests-torch "$python" -m pytest tests/python/cuda -q --maxfail=20 --durations=5
  for program in build/cuda/tests/cpp/backends/cuda/penstock_cuda_tests; do
    [ -x "$program" ] && run tests-cpp "$program" --gtest_brief=1
  done
}

part_sanitize() {
  lines=6
  for tool in memcheck racecheck synccheck initcheck; do
    run "sanitize-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      timeout 140 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" tests/python/cuda/sanitized_steps.py
  done
}

part_bench() {
  lines=80
  run bench bench --json "$folder/gpu-bf16.jsonl" --png "$folder/gpu-bf16.png"
}

part_skew() {
  lines=30
  for load in uniform zipf hot; do
    run "load-$load" bench --shape 7B-n256 --peers penstock --load "$load" \
      --json "$folder/gpu-load-$load.jsonl"
  done
  run save-input bench --shape 7B-n256 --peers penstock --save input \
    --json "$folder/gpu-save-input.jsonl"
  run low-memory bench --shape 7B-n256 --shape 30B-n256 --shape 120B-n1024 --peers penstock \
    --order low_memory --json "$folder/gpu-low-memory.jsonl"
  run decode bench --shape olmoe --shape qwen3-next --peers penstock --tokens 1,8,32,128 \
    --json "$folder/gpu-decode.jsonl"
}

part_profile() {
  lines=80
  run profile bench --shape 7B-n256 --shape 30B-n1024 --shape small-T --peers penstock --profile \
    --json "$folder/gpu-profile.jsonl"
}

[ $# -gt 0 ] || { sed -n '3,15s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$1" = all ] && set -- tests sanitize bench skew profile
mkdir -p "$folder"
: >"$summary"
for part in "$@"; do
  case $part in
    tests | sanitize | bench | skew | profile) "part_$part" ;;
    *) echo "gpu_check: no part '$part'" >&2; exit 2 ;;
  esac
done
echo
cat "$summary"
"$python" scripts/gpu_bars.py "$folder"
exit $failed
