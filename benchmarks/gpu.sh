#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command (benchmarks/gpu.py says what). Another Python: PYTHON=...
#   bash benchmarks/gpu.sh [--output_dir FOLDER] [--minutes 13] [--only PART,...] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
