#!/usr/bin/env bash
# Settings of the embedded corpus; the stages are in ../../run.sh.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings=(--noise_dir data/noise)
case " $* " in *" --lang zh "*) # a second corpus beside the English one
    settings=(--noise_dir data_zh/noise --data_dir data_zh --dumpdir dump_zh --expdir exp_zh
        --results RESULTS_zh.md --llm_config conf/llm/own_character.yaml) ;;
esac
exec "$here/../../run.sh" --recipe_dir "$here" "${settings[@]}" \
    --train_set train --valid_set valid --test_sets test \
    --train_snr -5:10 --valid_snr -5:10 --test_snr each:-5,0,5,10 \
    --enh_config "egs/mini/conf/train_blstm.yaml egs/mini/conf/train_blstm_cmkt.yaml" "$@"
