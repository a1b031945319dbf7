#!/usr/bin/env bash
# All benchmarks for a GPU: correctness, planned and measured memory, the comparison at 1B and 7B
# parameters, and a profile of one step. Takes 9 minutes; results are written as they come, so it
# can be interrupted at any time. Needs jax, flax, optax, NumPy and SciPy; lomo_jax need not be
# installed. Rows that need more (torch, transformers, lomo-optim) are skipped with the reason.
# Usage: bash benchmarks/gpu.sh [--dry-run] [DIR]
#   DIR: folder for the results, one file per part; by default benchmarks/results/gpu.
#   --dry-run: tiny sizes and few checks on the CPU, to see that every part works.
# Then python benchmarks/collect.py DIR writes benchmarks/results/DEVICE-DATE.json and the table in
# benchmarks/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
small=1b large=7b rounds=5 quick=
large_rows='^fused, (lomo|adalomo)$|^torch lomo-optim, AdaLomo'
memory='^fused, adalomo(, (clip|micro|inputs|all).*)?$' plans='^fused|scanned, adalomo'
rivals='^forward|scanned, adal|unrolled, adal|^fused, (lomo|adalomo|adamw)$|torch'
if [ "${1:-}" = --dry-run ]; then
  shift
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  small=tiny large=tiny rounds=1 quick=--quick
  memory='^fused, adalomo, all' plans='^fused, adalomo$' rivals='^forward|^fused, lomo|Lomo$'
  large_rows='^fused, adalomo$'
fi
dir=${1:-benchmarks/results/gpu}
mkdir -p "$dir"
end=$((SECONDS + 540))
failed=0

limit() { # limit SECONDS: prints SECONDS, or the time left if that is less
  local left=$((end - SECONDS))
  echo $((left < $1 ? left : $1))
}

part() { # part SECONDS NAME COMMAND...
  local seconds name=$2
  seconds=$(limit "$1")
  shift 2
  if [ "$seconds" -le 0 ]; then
    echo "== $name, skipped: no time left"
    return
  fi
  echo "== $name, at most $seconds s"
  timeout "$seconds" "$@" || { echo "$name: exit status $?"; failed=1; }
}

compare() { # compare SECONDS NAME SIZE ROWS ROUNDS
  part "$1" "$2" "$python" benchmarks/compare.py --size "$3" --rows "$4" --rounds "$5" \
    --budget $(($(limit "$1") - 5)) --json "$dir/$2.json"
}

# Plans need no GPU, so they are compiled while the GPU is in use.
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
plan() { # plan NAME SIZE
  JAX_PLATFORMS=cpu timeout 300 "$python" benchmarks/compare.py --size "$2" --rows "$plans" \
    --plan "${gpu:-rtx3090}" --json "$dir/planned-$1.json" >"$dir/planned-$1.log" 2>&1
}
{ plan small "$small"; plan large "$large"; } &

part 100 correct "$python" benchmarks/correct.py $quick --json "$dir/correct.json"
compare 100 memory "$small" "$memory" 1
compare 110 compare-small "$small" "$rivals" "$rounds"
compare 140 compare-large "$large" "$large_rows" "$rounds"
# The profiler does not report kernels inside a CUDA graph one by one.
part 90 profile env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" \
  "$python" benchmarks/profile_step.py --size "$large" --json "$dir/profile.json"
wait
ls "$dir"
exit "$failed"
