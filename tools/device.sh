#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU, no network needed: build, tests, sanitizers, benchmarks, table.
# tools/device.sh --help says more. PYTHON chooses the interpreter (default python3); it must have torch.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
  echo "tools/device.sh: $python not found: PYTHON must name a Python >= 3.10 with torch" >&2
  exit 1
fi
exec "$python" "$here/device.py" "$@" </dev/null
