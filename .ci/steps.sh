# Sourced by .ci/run and .ci/full: a fresh environment in a temporary folder, which is removed at exit, and steps that
# each print a verdict and their seconds. PYTHON chooses the interpreter. In the tree only what git ignores is left
# (build/, egg-info, .pytest_cache).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tmp=$(mktemp -d "${TMPDIR:-/tmp}/gcfast-ci.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir "$tmp/tmp"
export TMPDIR="$tmp/tmp" MPLCONFIGDIR="$tmp/matplotlib" TRITON_CACHE_DIR="$tmp/triton"
export RUFF_CACHE_DIR="$tmp/ruff" MYPY_CACHE_DIR="$tmp/mypy"

results=()
failed=0

# step NAME COMMAND...: runs it, prints and keeps its verdict and seconds; later steps run whatever it says.
step() {
  local name=$1 began=$SECONDS verdict=passed
  shift
  printf '\n== %s\n' "$name"
  # A subshell of its own: set -e does not act inside a function called from a condition.
  set +e
  (set -euo pipefail; "$@") </dev/null
  local code=$?
  set -e
  if [ "$code" -ne 0 ]; then
    verdict="FAILED ($code)"
    failed=1
  fi
  results+=("$(printf '%-14s %5d s  %s' "$name" "$((SECONDS - began))" "$verdict")")
  printf '== %s: %s, %d s\n' "$name" "$verdict" "$((SECONDS - began))"
}

environment() { # FOLDER, within the temporary one
  "${PYTHON:-python3}" -m venv "$tmp/$1"
  "$tmp/$1/bin/python" --version
}

enter() { # FOLDER: what follows runs in that environment
  export VIRTUAL_ENV="$tmp/$1" PATH="$tmp/$1/bin:$PATH"
  hash -r
}

today() { echo $(($(date +%s) / 86400)); } # a number that grows by one a day

summary() { # the verdicts once more; exits with what they amount to
  printf '\n== summary, %d s in all\n' "$SECONDS"
  printf '%s\n' "${results[@]}"
  local log
  for log in "$tmp"/*.log; do # pytest's own closing lines once more
    [ ! -f "$log" ] ||
      sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '^=* ?[0-9]+ [a-z]+.* in [0-9.]+s' | tail -n 1 || true
  done
  if [ "$failed" -eq 0 ]; then echo "all passed"; else echo "FAILED"; fi
  exit "$failed"
}
