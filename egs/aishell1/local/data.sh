#!/usr/bin/env bash
# Stage 1: AISHELL-1 as it lies on disk -> data/{train,valid,test}
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/prepare.py" "$@"
