#!/bin/bash
# Put what benchmarks/gpu.sh needs, and a machine without a network may lack, into benchmarks/prepared (ignored, under 64 MiB):
# the images of MNIST, and wheels of the few packages beside torch, pandas, pyarrow, scikit-learn, matplotlib and seaborn.
#     benchmarks/prepare.sh [PYTHON]      PYTHON: version on the other machine, such as 3.12 (which is taken if none is given)
set -euo pipefail
cd "$(dirname "$0")"
version=${1:-3.12}
rm -rf prepared && mkdir -p prepared/data/mnist prepared/wheels
platforms=$(for n in 2_28 2_27 2_24 2_17 2_12 2_5; do echo "--platform manylinux_${n}_x86_64"; done; echo "--platform manylinux2014_x86_64 --platform manylinux1_x86_64")
# shellcheck disable=SC2086
python3 -m pip download --quiet --only-binary=:all: --python-version "$version" --implementation cp $platforms \
    --dest prepared/wheels papermill 'ipykernel<7' pooch platformdirs
PYTHONPATH=.. python3 -c "from zootwins.datasets import load_images; print(load_images('mnist'))"
data=${ZOOTWINS_DATA:-$(PYTHONPATH=.. python3 -c 'from zootwins.core import data_folder; print(data_folder())')}
cp "$data"/mnist/*.gz prepared/data/mnist/
du -sm prepared
[ "$(du -sm prepared | cut -f1)" -lt 64 ] || { echo "benchmarks/prepared is larger than 64 MiB" >&2; exit 1; }
