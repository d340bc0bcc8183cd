#!/usr/bin/env bash
# Kaldi-style options: `--name value` sets the variable `name` if it is defined before this file
# is sourced. A true/false option may come without its value. `--help` prints $help_message.
# shellcheck disable=SC2154  # set by the caller
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) echo "$help_message"; exit 0 ;;
        --*) name=${1#--}; name=${name//-/_} ;;
        *) echo "run.sh: error: not an option: $1 (options start with --; see --help)" >&2; exit 2 ;;
    esac
    if [ -z "${!name+defined}" ] || [[ ! $help_message =~ --${name}[^a-z_] ]]; then
        near=$(grep -o -- '--[a-z_]*' <<<"$help_message" | grep -F -m1 -- "${name:0:4}" || true)
        echo "run.sh: error: unknown option $1${near:+ (did you mean $near?)}; see --help" >&2
        exit 2
    fi
    if [ $# -eq 1 ] || [[ $2 == --[a-z]* && ${!name} =~ ^(true|false)$ ]]; then
        [[ ${!name} =~ ^(true|false)$ ]] || { echo "run.sh: error: $1 needs a value" >&2; exit 2; }
        printf -v "$name" true
        shift
    else
        if [[ ${!name} =~ ^(true|false)$ && ! $2 =~ ^(true|false)$ ]]; then
            echo "run.sh: error: $1 takes true or false, not $2" >&2; exit 2
        fi
        printf -v "$name" '%s' "$2"
        shift 2
    fi
done
