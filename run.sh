#!/usr/bin/env bash
# The stages of every recipe. Run here it drives egs/mini; egs/<corpus>/run.sh sets what differs.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ "${1:-}" = --recipe_dir ] || exec "$root/egs/mini/run.sh" "$@"
recipe_dir=$2
shift 2
command_line="./run.sh"
help_message=$(<"$root/utils/help.txt")
stage=1 stop_stage=9 skip_data_prep=false skip_train=false skip_eval=false dry_run=false
ngpu=0 nj=2 fs=16000 data_dir=data dumpdir=dump expdir=exp results=RESULTS.md seeds=0 mix_seed=0 lang=""
train_set=train valid_set=valid test_sets=test corpus_dir="" noise_dir="" data_args="" train_args="" size=""
text_source=transcript recogniser=pocketsphinx embed_args="" download_dir="" validate_args="" mix_args=""
mixing_config="" metrics=pesq,stoi,estoi,si_snr,snr
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
check_numbers stage stop_stage nj ngpu fs mix_seed
here=$PWD
for name in corpus_dir download_dir; do # as seen from where run.sh was called
    [ -z "${!name}" ] || printf -v "$name" %s "$(realpath -m "${!name}")"
done
[ ! -e "$noise_dir" ] || noise_dir=$(realpath "$noise_dir")
cd "$recipe_dir"
OLDPWD=$here
configs="" uses_text=false
for config in $enh_config; do
    config=$(find_file "$config")
    configs+=" $config"
    ! grep -q '^transfer: cmkt' "$config" || uses_text=true
done
[ "$text_source" != none ] || { uses_text=false; train_args+=" --transfer none"; }
llm_config=$(find_file "$llm_config") llm_tag=$(basename "$llm_config" .yaml)
[ -z "$size" ] || { train_args+=" --size $size"; expdir+=_$size results=${results%.md}_$size.md; }
[ "$text_source" = transcript ] || llm_tag+=_${text_source/:/}
llm_dir=$dumpdir/llm/$llm_tag
[ -z "$mixing_config" ] || { mixing_config=$(find_file "$mixing_config"); train_args+=" --mixing_config $mixing_config"; }

if doing 1 "$skip_data_prep"; then
    begin 1 data
    # shellcheck disable=SC2086  # options in one string, as in Kaldi recipes
    run local/data.sh --corpus_dir "$corpus_dir" --data_dir "$data_dir" --seed "$mix_seed" --nj "$nj" \
        ${lang:+--lang "$lang"} ${download_dir:+--download_dir "$download_dir"} $data_args
    # shellcheck disable=SC2046,SC2086
    run cmkt validate $(for set in $train_set $valid_set $test_sets; do echo "$data_dir/$set"; done) \
        ${lang:+--lang "$lang"} --nj "$nj" --output_dir "$data_dir/validate" $validate_args
fi
if doing 2 "$skip_data_prep"; then
    begin 2 mix
    for set in $train_set $valid_set $test_sets; do
        need "$data_dir/$set" 1
        snr=$test_snr split=test
        [ "$set" != "$train_set" ] || { snr=$train_snr; split=train; }
        [ "$set" != "$valid_set" ] || { snr=$valid_snr; split=valid; }
        online=""
        [ -z "$mixing_config" ] || [ "$set" != "$train_set" ] || online=--online
        # shellcheck disable=SC2086
        run cmkt mix --data_dir "$data_dir/$set" --noise_dir "$noise_dir" --noise_split "$split" \
            --snr="$snr" --seed "$mix_seed" --fs "$fs" --nj "$nj" --output_dir "$dumpdir/audio/$set" $mix_args $online
    done
fi
if doing 3 "$skip_data_prep" && "$uses_text"; then
    begin 3 embed
    for set in $train_set $valid_set; do
        need "$dumpdir/audio/$set" 2
        text=$dumpdir/audio/$set/text source=$text_source
        case $text_source in
            asr | asr_noisy)
                text=$dumpdir/text/$text_source/$set/text
                noisy=${text_source#asr} noisy=${noisy/_/--}
                run cmkt transcribe --data_dir "$dumpdir/audio/$set" --recogniser "$recogniser" --nj "$nj" \
                    ${lang:+--language "$lang"} ${noisy:+"$noisy"} --output_dir "$(dirname "$text")" ;;
            # The controls change what is learnt from; the transfer gap is measured on the true text.
            *) need_text "$text"; [ "$set" = "$train_set" ] || source=transcript ;;
        esac
        if [ "$set" = "$train_set" ] && grep -q '^lm_train:' "$llm_config"; then
            run cmkt lm-train --llm_config "$llm_config" --text "$text"
        fi
        # shellcheck disable=SC2086
        run cmkt embed --llm_config "$llm_config" --text "$text" --text_source "$source" --seed "$mix_seed" \
            --nj "$nj" --output_dir "$llm_dir/$set" $embed_args
    done
fi
data_options="--train_dir $dumpdir/audio/$train_set --valid_dir $dumpdir/audio/$valid_set"
if doing 4 "$skip_data_prep"; then
    begin 4 stats
    for set in $train_set $valid_set; do need "$dumpdir/audio/$set" 2; done
    # shellcheck disable=SC2086
    run cmkt train --collect_stats true $data_options --output_dir "$expdir/stats"
    # shellcheck disable=SC2086
    ! grep -q 'name: mimic' $configs || run cmkt train-recogniser $data_options --output_dir "$expdir/recogniser"
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
                --output_dir "$exp/scores/$set" --nj "$nj" --metrics "$metrics"
        fi
    done
done; done
if doing 8 "$skip_eval"; then
    for set in $test_sets; do
        begin 8 "score noisy $set"; need "$dumpdir/audio/$set" 2
        run cmkt score --enhanced "$dumpdir/audio/$set/wav.scp" --reference_dir "$dumpdir/audio/$set" \
            --output_dir "$expdir/noisy/scores/$set" --nj "$nj" --metrics "$metrics"
    done
fi
if doing 9 "$skip_eval"; then
    begin 9 report
    run cmkt report --expdir "$expdir" --dumpdir "$dumpdir" --llm_dir "$llm_dir" --valid_set "$valid_set" \
        --output "$results" --command "$command_line"
fi
end_stage
log "done in $SECONDS s"
