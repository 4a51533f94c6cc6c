#!/usr/bin/env bash
# Everything about the kernels that only a GPU can prove, from quick to slow, with a short table at the end.
#   benchmarks/gpu_checks.sh [PYTHON] [RESULTS_FOLDER]
# Steps go on after a failure; the exit code counts the failed ones.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
results=${2:-benchmarks/results}
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
summary=()
failed=0

step() {  # name, then the command
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@" > "$results/$name.log" 2>&1; then verdict=ok; else verdict="FAILED ($results/$name.log)"; ((failed++)); fi
    tail -n 25 "$results/$name.log"
    summary+=("$(printf '%-22s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
step correctness "$python" -m pytest -q -x --maxfail=40 tests/kernels --ignore=tests/kernels/test_aot.py
step golden env FASTDIFF_DEVICE=cuda "$python" -m pytest -q --maxfail=40 tests/test_golden_kernels.py tests/test_golden_model.py
if command -v compute-sanitizer > /dev/null; then
    small=(-m pytest -q -k "shapes or every_way or dropout or step or q_sample or attention and not compiles")
    for tool in memcheck racecheck; do
        step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "${small[@]}" \
            tests/kernels/test_group_norm_silu.py tests/kernels/test_diffusion_kernels.py tests/kernels/test_attention.py
    done
fi
step figures "$python" -m pytest -q -W ignore -o python_files='bench_*.py' -o python_functions='bench_*' \
    -o timeout=3600 benchmarks/bench_*.py --benchmark-json "$results/kernels.json"
step training "$python" -m pytest -q --maxfail=40 -k gpu tests/training tests/benchmarks tests/images
step sampling "$python" -m pytest -q --maxfail=40 tests/sampling tests/diffusion tests/test_api.py
echo
printf '%s\n' "${summary[@]}"
exit "$failed"
