#!/usr/bin/env bash
# Stage 1: any folder of clean speech -> data/{train,valid,test}
set -euo pipefail
exec python3 -m cmkt.corpus.folder "$@"
