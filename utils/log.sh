#!/usr/bin/env bash
# Messages of run.sh, with the time each stage took. Source it.
stage_name=""
log() { echo "$(date +%H:%M:%S) $*"; }
begin_stage() { # number name
    end_stage
    stage_name="stage $1 ($2)" stage_start=$SECONDS
    log "$stage_name"
}
end_stage() {
    [ -z "$stage_name" ] || log "$stage_name: $((SECONDS - stage_start)) s"
    stage_name=""
}
fail() { # message [exit status]
    echo "run.sh: error: $1" >&2
    exit "${2:-1}"
}
