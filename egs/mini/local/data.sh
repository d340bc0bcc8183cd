#!/usr/bin/env bash
# Synthesise the embedded corpus; run.sh calls this in the recipe's folder (see --help).
set -euo pipefail
exec python3 "$(dirname "$0")/synthesise.py" "$@"
