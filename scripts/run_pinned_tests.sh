#!/usr/bin/env bash
# Tests on the oldest stack that is supported, which is the one ColossalAI 0.5.0 pins: torch 2.5.1, transformers 4.51.3.
# Makes .venv-pinned with `pip install -e .[colossalai]` (5.9 GB, some minutes the first time) and reuses it afterwards.
# Arguments go to pytest; with paths among them, these are run instead of the selection below.
set -euo pipefail
VENV="${VENV_PINNED:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-pinned}"
source "$(dirname "${BASH_SOURCE[0]}")/lib_venv.sh"

ensure_pinned() {
  local stamp="$VENV/.installed-pinned" checksum tools
  make_venv
  checksum="$(install_checksum)"
  [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ] && return
  echo "installing ColossalAI's own pins into $VENV (the first time takes some minutes)" >&2
  mapfile -t tools < <(grep -E '^(pytest|hypothesis|matplotlib|setuptools)==' "$ROOT/constraints.txt")
  "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet -e "$ROOT[colossalai]" "${tools[@]}" >&2 ||
    fail "pip could not install ColossalAI with its pins (its messages are above)" \
      "check the network and 6 GB of free disk, then run this again; PYTHON names an interpreter that torch 2.5.1 has"
  echo "$checksum" >"$stamp"
}

ensure_pinned
cd "$ROOT"
"$VENV/bin/python" - <<'PINS'
import torch, transformers
found = torch.__version__.partition("+")[0], transformers.__version__
assert found == ("2.5.1", "4.51.3"), f"the pinned environment has torch and transformers {found}"
PINS

# What meets torch and transformers: models, policies, weights, engine, ranks, and the bridge. Left out are parts that
# meet neither (configuration, migration, command line), and the longest searches, which the current stack runs.
selection=(tests/unit tests/attention/test_*.py tests/e2e/test_parity.py tests/e2e/test_demo_model.py tests/distributed/test_group.py)
for name in config migrate cli tuning selection_golden architecture bench doctor probes mutations serving; do
  for file in tests/unit/test_"$name"*.py; do
    if [ -e "$file" ]; then selection+=("--ignore=$file"); fi
  done
done
selection+=(tests/unit/test_colossalai*.py tests/distributed/test_colossalai*.py tests/e2e/test_*colossalai*.py)
for argument in "$@"; do
  if [ -e "${argument%%::*}" ]; then selection=(); fi
done
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several ranks at once
exec "$VENV/bin/pytest" -p no:cacheprovider "${selection[@]}" "$@"
