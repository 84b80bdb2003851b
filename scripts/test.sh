#!/usr/bin/env bash
# Lint and test, in an environment that this script creates:
#
#   bash scripts/test.sh                 everything
#   bash scripts/test.sh --quick         without the slow tests
#   bash scripts/test.sh --exhaustive    with further cases of the same tests
#   bash scripts/test.sh -k matcher      other arguments are for pytest
#   TEST_JOBS=8 bash scripts/test.sh     tests at a time (3: some wait), each with one thread; up to 5 GB of memory each
set -euo pipefail
source "$(dirname "$0")/env.sh" requirements-dev.txt
bash scripts/build_ops.sh

if [ "${1:-}" = --quick ]; then
    shift
    set -- -m 'not slow' "$@"
fi
ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # each process of a test would compile this code again
python -m pytest -n "${TEST_JOBS:-3}" --dist worksteal "$@"
