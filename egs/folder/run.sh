#!/usr/bin/env bash
# Settings of the folder-of-speech recipe; the stages are in ../../run.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "$here/../../run.sh" --recipe_dir "$here" \
    --train_set train --valid_set valid --test_sets test \
    --train_snr -5:10 --valid_snr -5:10 --test_snr -5,0,5,10 "$@"
