#!/bin/bash
# ResNet-18 on CIFAR-10 as in Tables 6 and 12 of "Sparse Model Soups", on one GPU, in parts of under 8 minutes:
#     benchmarks/resnet18_gpu.sh [FOLDER] [SEEDS]      FOLDER: for all files (runs/resnet18); SEEDS: such as 0,1,2 (0)
# Each start is a part: it goes on from the last epoch that an earlier one has finished, and is killed after LIMIT seconds (465).
# It ends with 0 when all tables are there (FOLDER/rows.csv), and with 75 when it has to be started again. Dense training is
# shortened to 30 epochs, linear from 0.1 to 0, where the paper has 200; retraining has the paper's 20 epochs with ALLR.
# TOY=1 makes a narrow net on digits on the processor, to see that everything runs.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
timeout --signal=KILL "${LIMIT:-465}" python3 -m zootwins.network_studies resnet18 "${1:-runs/resnet18}" --seeds "${2:-0}" \
    ${TOY:+--toy --device cpu}
status=$?
[ "$status" -eq 137 ] && { echo "This part is over; start again to go on."; exit 75; }
exit "$status"
