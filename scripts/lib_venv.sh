# Sourced by the other scripts: makes or reuses the virtual environment and installs this repository into it.
#
#   PYTHON=python3.12     the interpreter to make the environment with (default: python3)
#   VENV=/path            where the environment lies (default: .venv in the repository)

# The bridge's set is installed beside it: ColossalAI without what it asks pip for, and what it really imports.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
BRIDGE=(colossalai psutil einops peft accelerate galore_torch bitsandbytes) # versions: constraints.txt

fail() {
  printf 'error: %s\n  remedy: %s\n' "$1" "$2" >&2
  exit 3
}

# Make $VENV unless it is there.
make_venv() {
  [ -x "$VENV/bin/python" ] && return
  local python="${PYTHON:-python3}"
  command -v "$python" >/dev/null 2>&1 || fail "$python is not installed" "install Python 3.10 or newer, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; Python 3.10 or newer is needed" "install one and set PYTHON, for example PYTHON=python3.12"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks the venv module" "install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON"
  echo "making $VENV with $("$python" --version)" >&2
  "$python" -m venv "$VENV"
}

# A checksum of everything that decides what gets installed.
install_checksum() {
  {
    cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/constraints.txt"
    echo "$ROOT" "${BRIDGE[@]}"
    "$VENV/bin/python" --version
  } | "$VENV/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# ensure_installed [test]: install this repository, editable, with the tested versions; a no-op when nothing changed.
ensure_installed() {
  local extra="${1:-}" stamp="$VENV/.installed-" checksum
  make_venv
  checksum="$(install_checksum)"
  [ "$(cat "$stamp$extra" 2>/dev/null)" = "$checksum" ] && return
  echo "installing into $VENV (the first time takes some minutes)" >&2
  local quiet=()
  [ -t 2 ] || quiet=(--quiet)
  "$VENV/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" \
    -c "$ROOT/constraints.txt" -e "$ROOT${extra:+[$extra]}" >&2 ||
    fail "pip could not install this repository (its messages are above)" "check the network and the package index, then run this again"
  "$VENV/bin/python" -m pip install --disable-pip-version-check "${quiet[@]}" \
    -c "$ROOT/constraints.txt" --no-deps "${BRIDGE[@]}" >&2 ||
    fail "pip could not install ColossalAI beside it (its messages are above)" "check the network and the package index, then run this again"
  echo "$checksum" | tee "$stamp" >"$stamp$extra"
}
