#!/bin/sh
# Stands in for the router or the shard: does what the test wrote for the program of this name. $config is the run
# configuration, $socket where the shard would listen; `serve` is there until the launcher says stop.
config=$2
socket=$(dirname "$config")/shard-0.sock
say() { echo "$@" >&2; }
serve() { cat > /dev/null; }
. "$CHILDREN/$(basename "$0").sh"
