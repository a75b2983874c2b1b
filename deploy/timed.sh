#!/usr/bin/env bash
# Runs the parts of a job one after the other and prints how many seconds each took, also if one of them fails.
# deploy/timed.sh NAME COMMAND [NAME COMMAND ...]
set -euo pipefail

report=
finish() {
  local status=$?
  printf '%s' "$report" | awk '{ printf "%-16s %5d s\n", $1, $2; sum += $2 } END { printf "%-16s %5d s\n", "total", sum }'
  exit "$status"
}
trap finish EXIT

while (($# >= 2)); do
  begin=$SECONDS status=0
  bash -euo pipefail -c "$2" || status=$?
  report+="$1 $((SECONDS - begin))"$'\n'
  ((status == 0)) || exit "$status"
  shift 2
done
