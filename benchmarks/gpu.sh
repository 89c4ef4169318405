#!/bin/bash
# Everything about the GPU engine that needs a GPU, in one go of under 8 minutes:
#     benchmarks/gpu.sh [FOLDER]          FOLDER: for results (benchmarks/results if none is given)
# It needs a torch with CUDA, a C++ compiler and the packages of settings.ini; what benchmarks/prepare.sh has fetched is used. Its
# parts do not depend on each other, and the last one is given the time that the others leave: a zoo that is not finished goes on
# where it was when the script is started again with the same folder. The script fails if one of the first three parts does.
#   check   device against host after 5 steps, orders, a model alone and among a thousand
#   race    compute-sanitizer looks for races
#   rates   model-samples per second of all nets and stages, beside the reference engine, and the share of the peak
#   zoo     mnist_seed with 1000 models, all stages: tables and figures
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-benchmarks/results}"
results=$(cd "${1:-benchmarks/results}" && pwd)
prepared=$PWD/benchmarks/prepared
if [ -d "$prepared/wheels" ]; then
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$prepared"/wheels/*.whl
    export PYTHONPATH=$PWD:$site ZOOTWINS_DATA=$prepared/data
else
    export PYTHONPATH=$PWD
fi
export PYTHONUNBUFFERED=1 MPLBACKEND=Agg
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv | tee "$results/device.csv"

failed=0
part() {  # name, seconds at most, command
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit status $status after $((SECONDS - began)) s"
    return "$status"
}

for number in 0 1 2 3 4 5; do timeout 60 python3 benchmarks/gpu.py build "$number" & done  # side by side, into the cache
wait
part check 60 python3 benchmarks/gpu.py check --results "$results" || failed=1
part race 90 compute-sanitizer --tool racecheck --error-exitcode 1 python3 benchmarks/gpu.py race || failed=1
part rates 120 python3 benchmarks/gpu.py rates --results "$results" || failed=1
left=$((470 - SECONDS))
part zoo "$left" python3 -m papermill nbs/run_zoo.ipynb "$results/mnist_seed.ipynb" -p zoo mnist_seed -p n_models 1000 -p device cuda \
    -p store "$results/zoos" -p figures "$results/figures" --kernel python3 --no-progress-bar --log-output
exit $failed
