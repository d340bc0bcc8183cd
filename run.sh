#!/usr/bin/env bash
# The stages of every recipe. Run here it drives egs/mini; egs/<corpus>/run.sh sets what differs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "${1:-}" = --recipe_dir ] || exec "$root/egs/mini/run.sh" "$@"
recipe_dir=$2
shift 2
command_line="./run.sh"
help_message="Usage: ./run.sh [--stage N] [--stop_stage N] [options]

Stages: 1 data, 2 mix, 3 embed (LLM features), 4 stats, 5 train, 6 export, 7 enhance, 8 score, 9 report
  --stage N           first stage to run (default 1)
  --stop_stage N      last stage to run (default 9)
  --skip_data_prep    skip stages 1 to 4
  --skip_train        skip stage 5
  --skip_eval         skip stages 6 to 9
  --ngpu N            GPUs of one training (default 0)
  --nj N              parallel jobs (default 2)
  --dumpdir DIR       mixtures and features (default dump)
  --expdir DIR        experiments (default exp)
  --train_set NAME    training set
  --valid_set NAME    validation set
  --test_sets 'A B'   test sets
  --enh_config 'F..'  training YAMLs; each is trained
  --seeds '0 1'       seeds; each YAML is trained with each (default 0)
  --llm_config FILE   language-model YAML (default conf/llm/minilm.yaml)
  --corpus_dir DIR    the corpus as it lies on disk
  --noise_dir DIR     a tree of noise files
  --data_args '...'   passed to local/data.sh
  --train_args '...'  passed to cmkt train, for example '--max_epoch 3'
  --train_snr, --valid_snr, --test_snr   see cmkt mix --help
  --fs HZ             sampling rate (default 16000)
  --mix_seed N        seed of data and mixtures (default 0)
  --dry_run           print the commands, run none
  --help              this text

Outputs lie in the recipe's folder. A second identical run does nothing; a killed one goes on."
stage=1 stop_stage=9 skip_data_prep=false skip_train=false skip_eval=false dry_run=false
ngpu=0 nj=2 fs=16000 dumpdir=dump expdir=exp seeds=0 mix_seed=0
train_set=train valid_set=valid test_sets=test corpus_dir="" noise_dir="" data_args="" train_args=""
enh_config="conf/train_blstm.yaml conf/train_blstm_cmkt.yaml" llm_config=conf/llm/minilm.yaml
train_snr=-5:10 valid_snr=-5:10 test_snr=-5,0,5,10
for word in "$@"; do
    [[ $word == *" "* ]] && command_line+=" '$word'" || command_line+=" $word"
done
# shellcheck source=utils/log.sh
. "$root/utils/log.sh"
# shellcheck source=utils/stages.sh
. "$root/utils/stages.sh"
# shellcheck source=utils/parse_options.sh
. "$root/utils/parse_options.sh"
for name in stage stop_stage nj ngpu fs mix_seed; do
    [[ ${!name} =~ ^[0-9]+$ ]] || fail "--$name takes a number, not '${!name}'" 2
done
here=$PWD
[ -z "$corpus_dir" ] || corpus_dir=$(realpath -m "$corpus_dir")
[ ! -e "$noise_dir" ] || noise_dir=$(realpath "$noise_dir")
cd "$recipe_dir"
OLDPWD=$here
configs="" uses_text=false
for config in $enh_config; do
    config=$(find_file "$config")
    configs+=" $config"
    ! grep -q '^transfer: cmkt' "$config" || uses_text=true
done
llm_config=$(find_file "$llm_config")
llm_tag=$(basename "$llm_config" .yaml)
llm_dir=$dumpdir/llm/$llm_tag

if doing 1 "$skip_data_prep"; then
    begin 1 data
    # shellcheck disable=SC2086  # options in one string, as in Kaldi recipes
    run local/data.sh --corpus_dir "$corpus_dir" --data_dir data --seed "$mix_seed" --nj "$nj" $data_args
fi
if doing 2 "$skip_data_prep"; then
    begin 2 mix
    for set in $train_set $valid_set $test_sets; do
        need "data/$set" 1
        snr=$test_snr split=test
        [ "$set" != "$train_set" ] || { snr=$train_snr; split=train; }
        [ "$set" != "$valid_set" ] || { snr=$valid_snr; split=valid; }
        run cmkt mix --data_dir "data/$set" --noise_dir "$noise_dir" --noise_split "$split" \
            --snr="$snr" --seed "$mix_seed" --fs "$fs" --nj "$nj" --output_dir "$dumpdir/audio/$set"
    done
fi
if doing 3 "$skip_data_prep" && "$uses_text"; then
    begin 3 embed
    for set in $train_set $valid_set; do
        need "$dumpdir/audio/$set" 2
        run cmkt embed --llm_config "$llm_config" --text "$dumpdir/audio/$set/text" --output_dir "$llm_dir/$set"
    done
fi
data_options="--train_dir $dumpdir/audio/$train_set --valid_dir $dumpdir/audio/$valid_set"
if doing 4 "$skip_data_prep"; then
    begin 4 stats
    for set in $train_set $valid_set; do need "$dumpdir/audio/$set" 2; done
    # shellcheck disable=SC2086
    run cmkt train --collect_stats true $data_options --output_dir "$expdir/stats"
fi
if doing 5 "$skip_train"; then
    begin 5 train
    need "$expdir/stats" 4
    ! "$uses_text" || need "$llm_dir/$train_set" 3
    # On CPUs several trainings run side by side with one thread each; on GPUs one after another.
    at_once=$nj
    [ "$ngpu" -eq 0 ] || at_once=1
    # shellcheck disable=SC2064,SC2046
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    for seed in $seeds; do for config in $configs; do
        while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n; done
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 run cmkt train --config "$config" $data_options --llm_dir "$llm_dir" --stats_dir "$expdir/stats" \
            --output_dir "$expdir/$(tag_of "$config" "$seed")" --seed "$seed" --ngpu "$ngpu" $train_args &
    done; done
    while [ -n "$(jobs -p)" ]; do wait -n; done
    trap - EXIT
fi
for config in $configs; do for seed in $seeds; do
    exp=$expdir/$(tag_of "$config" "$seed")
    if doing 6 "$skip_eval"; then
        begin 6 "export $exp"; need "$exp" 5
        run cmkt export "$exp"
    fi
    for set in $test_sets; do
        if doing 7 "$skip_eval"; then
            begin 7 "enhance $exp $set"; need "$exp/export" 6; need "$dumpdir/audio/$set" 2
            run cmkt enhance "$exp/export" "$dumpdir/audio/$set/wav.scp" -o "$exp/enhanced/$set" --nj "$nj"
        fi
        if doing 8 "$skip_eval"; then
            begin 8 "score $exp $set"; need "$exp/enhanced/$set" 7
            run cmkt score --enhanced "$exp/enhanced/$set/wav.scp" --reference_dir "$dumpdir/audio/$set" \
                --output_dir "$exp/scores/$set" --nj "$nj"
        fi
    done
done; done
if doing 8 "$skip_eval"; then
    for set in $test_sets; do
        begin 8 "score noisy $set"; need "$dumpdir/audio/$set" 2
        run cmkt score --enhanced "$dumpdir/audio/$set/wav.scp" --reference_dir "$dumpdir/audio/$set" \
            --output_dir "$expdir/noisy/scores/$set" --nj "$nj"
    done
fi
if doing 9 "$skip_eval"; then
    begin 9 report
    run cmkt report --expdir "$expdir" --dumpdir "$dumpdir" --llm_dir "$llm_dir" --valid_set "$valid_set" \
        --output RESULTS.md --command "$command_line"
fi
end_stage
log "done in $SECONDS s"
