#!/usr/bin/env bash
# Settings of the VoiceBank-DEMAND recipe; the stages are in ../../run.sh. The corpus is noisy
# already, so there is neither noise nor a signal-to-noise ratio to set.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# The held-out speakers of the training set are in its noise, as is the custom (README.md).
exec "$here/../../run.sh" --recipe_dir "$here" \
    --train_set train --valid_set valid --test_sets test \
    --validate_args "--allow shared_noise" \
    --metrics pesq,csig,cbak,covl,segsnr,stoi,estoi,si_snr "$@"
