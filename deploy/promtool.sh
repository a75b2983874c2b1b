#!/usr/bin/env bash
# Fetches promtool, in the version that Debian has, into .cache/promtool. Needs apt and its list of sources, and no root:
# lists of packages are fetched into a folder of their own, because a new machine may have none.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -x .cache/promtool/usr/bin/promtool ]] && exit
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# apt drops its privileges where it can write as another user.
chmod 777 "$folder"
mkdir -p "$folder"/{lists,cache}/partial "$folder/cache/archives/partial"
chmod -R 777 "$folder"
apt=(apt-get -qq -o "Dir::State::Lists=$folder/lists" -o "Dir::Cache=$folder/cache")
"${apt[@]}" update
(cd "$folder" && "${apt[@]}" download prometheus)
dpkg -x "$folder"/prometheus_*.deb "$folder/prometheus"
mkdir -p .cache/promtool/usr/bin
install "$folder/prometheus/usr/bin/promtool" .cache/promtool/usr/bin/promtool
