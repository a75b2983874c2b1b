#!/bin/sh
# Stands in for the router or the shard: does what the test wrote for the program of this name. $config is the run
# configuration. `serving` tells the launcher that it serves, `beat` shows signs of life from now on, and `serve` is
# there until the launcher says stop.
config=$2
say() { echo "$@" >&2; }
serving() { printf +; }
beat() { while printf . 2> /dev/null; do sleep 0.2; done & }
serve() { cat > /dev/null; }
. "$CHILDREN/$(basename "$0").sh"
