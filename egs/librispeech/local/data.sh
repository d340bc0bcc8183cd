#!/usr/bin/env bash
# Stage 1: LibriSpeech as it lies on disk -> data/{train,valid,test_clean,test_other}
set -euo pipefail
exec python3 "$(dirname "${BASH_SOURCE[0]}")/prepare.py" "$@"
