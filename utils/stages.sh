#!/usr/bin/env bash
# What run.sh asks about its stages and files. Source it.
# shellcheck disable=SC2154  # the options are set by run.sh
find_file() { # a YAML as given, in the recipe, or in the repository
    for file in "$OLDPWD/$1" "$1" "$root/$1"; do
        [ ! -f "$file" ] || { realpath --relative-to=. "$file"; return; }
    done
    fail "no such file: $1 (looked here, in $recipe_dir and in the repository)" 2
}
check_numbers() { # names of options
    for name in "$@"; do
        [[ ${!name} =~ ^[0-9]+$ ]] || fail "--$name takes a number, not '${!name}'" 2
    done
}
run() { if "$dry_run"; then echo "+ $*"; else "$@"; fi; }
doing() { # is stage $1 wanted? $2: the group's skip switch
    [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ] && ! "$2"
}
need() { # folder stage: stop unless an earlier stage has finished the folder
    "$dry_run" || [ -e "$1/.done.json" ] ||
        fail "stage $stage_number needs $1, which stage $2 makes: ./run.sh --stage $2"
}
need_text() { # file: stop where there are no transcripts to learn from
    "$dry_run" || [ -s "$1" ] || fail "no transcripts: $1; give --text_source asr (or none for a baseline only)"
}
tag_of() { # config seed
    local name
    name=$(basename "$1" .yaml)
    ! grep -q '^transfer: cmkt' "$1" || name+=_$llm_tag
    [ -z "$mixing_config" ] || name+=_online_$(basename "$mixing_config" .yaml)
    echo "${name#train_}_seed$2"
}
begin() { stage_number=$1; begin_stage "$1" "$2"; }
