#!/usr/bin/env bash
# Stage 1: Kaldi data directories -> data/{train,valid,test}
set -euo pipefail
exec python3 -m cmkt.corpus.kaldi "$@"
