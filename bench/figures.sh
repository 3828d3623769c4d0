#!/usr/bin/env bash
# Memory, size and times of Orca, each beside its goal: a table in Markdown. Needs a Docker engine for what is about
# containers, and says so without one.
#
#   bench/figures.sh [RUNS]     medians of 5 runs each
set -euo pipefail
export LC_ALL=C

cd "$(dirname "$0")/.."
runs=${1:-5}
# Together, or what they share would be built once for each.
packages=(-p orca -p orca-bench)
if [ -z "${SKIP_BUILD:-}" ]; then
    cargo build --quiet --release "${packages[@]}" --bin orca --bin figures
fi
built=${CARGO_TARGET_DIR:-target}/release

if ! docker image inspect orca-test/app:1 >/dev/null 2>&1 && ! cargo xtask images; then
    echo "without a Docker engine and its images nothing is said of containers" >&2
fi

machine="$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores, Linux $(uname -r | cut -d- -f1), $(date +%F)"
before=$(cut -d' ' -f1 /proc/loadavg)
table=$("$built/figures" "$built/orca" "$runs")
inside=$(cargo bench --quiet "${packages[@]}" --bench wasm)
echo "$machine; load $before at the start, $(cut -d' ' -f1 /proc/loadavg) at the end; medians of $runs (least – most)"
echo
echo "| what | measured | goal |"
echo "|---|---|---|"
echo "$table"
echo "$inside"
