#!/usr/bin/env bash
# Runs a command on a copy of gcfast/ as it is when installed, where triton_kernels/ is gcfast.triton_kernels:
#   bash tools/installed.sh lint-imports --no-cache
#   bash tools/installed.sh mypy gcfast
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r gcfast pyproject.toml "$copy"
rm -rf "$copy/gcfast/triton_kernels" # a link that someone made
cp -r triton_kernels "$copy/gcfast/"
cd "$copy"
"$@"
