#!/usr/bin/env bash
# From a fresh clone to generated text: makes .venv, installs, and runs the demo model on two CPU ranks.
# Further arguments go to `inference-shardformer generate`, for example: --prompt "class Stack:" --max-new-tokens 200
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib_venv.sh"
ensure_installed

prompt=(--prompt "def fibonacci(n):")
case " $* " in *" --prompt"*) prompt=() ;; esac
sampling=(--temperature 0.7 --top-p 0.9 --seed 2 --max-new-tokens 96) # a small model loops when it is greedy
exec "$VENV/bin/inference-shardformer" generate --model demo --tp 2 "${sampling[@]}" "${prompt[@]}" "$@"
