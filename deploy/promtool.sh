#!/usr/bin/env bash
# Fetches promtool, in the version that Debian has, into .cache/promtool. Needs apt's lists of packages, and no root.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x .cache/promtool/usr/bin/promtool ]] && exit
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# apt drops its privileges where it can write as another user.
chmod 777 "$folder"
(cd "$folder" && apt-get -qq download prometheus)
dpkg -x "$folder"/prometheus_*.deb "$folder/prometheus"
mkdir -p .cache/promtool/usr/bin
install "$folder/prometheus/usr/bin/promtool" .cache/promtool/usr/bin/promtool
