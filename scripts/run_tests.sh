#!/usr/bin/env bash
# Makes or reuses .venv, then runs the linter, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib_venv.sh"
ensure_installed test

cd "$ROOT"
cores="$("$VENV/bin/python" -c 'import os; print(len(os.sched_getaffinity(0)))')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 3 ? cores / 2 : 1))}" # tests start several ranks at once

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/pytest" "$@"
