#!/usr/bin/env bash
# The whole GPU programme in one call of under nine minutes: tests, mamba_ssm's CUDA scan built from its sources, the scan
# alone, whole models.
#
#     benchmarks/gpu.sh [OUTPUT]      OUTPUT: folder for results and logs (default: benchmarks/results)
#
# Needs no network. What is not there is left out, and said: $MAMBA_SSM_SRC, unpacked sources of mamba_ssm (default:
# .cache/mamba_ssm-src), where $MAMBA_SSM (default: .cache/mamba_ssm) does not hold its scan from an earlier run;
# $PUBLISHED, a folder with the package mambavision 1.2.0 (default: .cache/mambavision-1.2.0). In a copy of the files
# $COMMIT names their commit. A step that fails or runs out of time leaves what it has written, and the next one starts;
# the exit status is the number of such steps.

set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
output=${1:-$root/benchmarks/results}
output=$(mkdir -p "$output" && cd "$output" && pwd) || exit 1
cd "$root" || exit 1

total=${TOTAL:-530} # seconds for everything
build=170           # in the background, while the tests run
warming=150         # in the background too: torch.compile keeps what it made
gpu_tests=165
mamba_ssm_tests=40
scan=60
models=50
compiled=45
fused_compiled=45
training=70
sizes=50

python=${PYTHON:-python3}
sources=${MAMBA_SSM_SRC:-.cache/mamba_ssm-src}
published=${PUBLISHED:-.cache/mambavision-1.2.0}
built=${MAMBA_SSM:-$PWD/.cache/mamba_ssm}
log=$output/gpu.log
failed=()
warming_up=()
: >"$log"
export PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export PYTHONPATH=$built${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$@" | tee -a "$log"; }

step() { # step NAME SECONDS COMMAND...: runs it within its time and what is left of the total
  local name=$1 seconds=$2 left=$((total - SECONDS)) status
  shift 2
  ((seconds = seconds < left ? seconds : left))
  say "== $name, at most $seconds s: $*"
  if ((seconds < 5)); then
    say "no time left"
    status=124
  else
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$log" # pytest then says what failed so far
    status=${PIPESTATUS[0]}
  fi
  ((status)) && failed+=("$name ($status)")
  say "== $name ended with $status, $SECONDS s in all"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch finds no GPU here" >&2
  exit 1
fi

building=
if [[ -e $built/selective_scan_cuda.so ]]; then
  say "mamba_ssm's CUDA scan is built"
elif [[ -d $sources ]]; then
  timeout --kill-after=5 "$build" "$python" benchmarks/cuda_scan.py "$sources" "$built" >"$output/build.log" 2>&1 &
  building=$!
else
  say "no $sources: mamba_ssm's CUDA scan is left out"
fi
for ahead in ours-compiled ours-graphs ours-fused-compiled convnext_tiny-compiled training; do
  settings=(--modes inference --batches 128 --precisions bf16 --contenders "$ahead")
  [[ $ahead == training ]] && settings=(--modes training --precisions autocast-bf16 --contenders ours)
  timeout --kill-after=5 "$warming" "$python" benchmarks/throughput.py --device cuda --results "$(mktemp -d)" \
    "${settings[@]}" --rounds 1 --max-other-cpu 100 >/dev/null 2>&1 &
  warming_up+=($!)
done

mapfile -t gpu_files < <(grep -l 'mark\.gpu' tests/test_*.py)
step gpu-tests "$gpu_tests" "$python" -m pytest -o addopts= -q -n 8 -m gpu "${gpu_files[@]}"
if [[ $building ]]; then
  wait "$building"
  status=$?
  say "== build of mamba_ssm's CUDA scan ended with $status, $SECONDS s in all"
  if ((status)); then
    failed+=("build ($status)")
    say "$(tail -n 20 "$output/build.log")"
  else
    step mamba_ssm-tests "$mamba_ssm_tests" "$python" -m pytest -o addopts= -q -n 4 -m gpu -k mamba_ssm "${gpu_files[@]}"
  fi
fi
wait "${warming_up[@]}"

common=(--device cuda --results "$output" --max-other-cpu 100) # in a container, the other processes are the host's
models_common=("${common[@]}")
[[ -d $published ]] && models_common+=(--published "$published")
step scan "$scan" "$python" benchmarks/scan.py "${common[@]}" --lengths 196 49 1024 4096 12544 --rounds 7 \
  --contenders triton mamba_ssm mamba_ssm-native triton-graph mamba_ssm-graph mamba_ssm-native-graph
step models "$models" "$python" benchmarks/throughput.py "${models_common[@]}" --modes inference --batches 128 \
  --precisions bf16
step compiled "$compiled" "$python" benchmarks/throughput.py "${models_common[@]}" --modes inference --batches 128 \
  --precisions bf16 --contenders ours-compiled ours-graphs published
step fused-compiled "$fused_compiled" "$python" benchmarks/throughput.py "${models_common[@]}" --modes inference \
  --batches 128 --precisions bf16 --contenders ours-fused-compiled published convnext_tiny-compiled
step training "$training" "$python" benchmarks/throughput.py "${models_common[@]}" --modes training \
  --precisions autocast-bf16 --contenders ours published convnext_tiny --rounds 7
step sizes "$sizes" "$python" benchmarks/throughput.py "${models_common[@]}" --modes resolution inference --batches 1 8 \
  --precisions bf16 --rounds 7

if ((${#failed[@]})); then
  echo "error: of the steps, these failed: ${failed[*]}" >&2
fi
exit ${#failed[@]}
