#!/bin/sh
# Stands in for the router or the shard: does what the test wrote for the program of this name. $config is the run
# configuration. `serving` tells the launcher that it serves, `beat` shows signs of life from now on, and `serve` is
# there until the launcher says stop. $rank is the rank of a shard. Asked for its GPUs, or among how many ranks a model
# can be divided, a shard does what the test wrote for that.
say() { echo "$@" >&2; }
if [ "$1" = --devices ]; then . "$CHILDREN/devices.sh"; exit; fi
if [ "$1" = --divides ]; then . "$CHILDREN/divides.sh"; exit; fi
config=$2
rank=$4
serving() { printf +; }
beat() { while printf . 2> /dev/null; do sleep 0.2; done & }
serve() { cat > /dev/null; }
. "$CHILDREN/$(basename "$0").sh"
