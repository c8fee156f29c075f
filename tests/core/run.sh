#!/usr/bin/env bash
# Builds and runs the C++ tests of csrc/core, each header's algorithms on the host from the source that the device
# compiles:   bash tests/core/run.sh [MODE...] [PROGRAM...] [-- ARGUMENTS OF THE PROGRAMS]
# A program is the name of a file here without its .cpp (default: all of them). Modes (default: the first four):
#   plain      for the baseline instruction set
#   native     for this processor, with contraction into FMAs, as the fastest CPU kernels are built
#   sanitized  under AddressSanitizer and UndefinedBehaviorSanitizer
#   nvcc       compiled only, for host and device
#   threads    what runs in teams of threads, under ThreadSanitizer
# A mode whose compiler is missing is skipped with a line that says so; the exit status is 77 if all were, 1 if
# anything failed. CXX and NVCC name the compilers (default g++, nvcc), CXXFLAGS adds options.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

modes=() programs=() arguments=()
while [ $# -gt 0 ]; do
  if [ "$1" = -- ]; then shift; arguments=("$@"); break; fi
  if [ -f "$1.cpp" ]; then programs+=("$1"); else modes+=("$1"); fi
  shift
done
[ "${#programs[@]}" -gt 0 ] || for source in *.cpp; do programs+=("${source%.cpp}"); done
[ "${#modes[@]}" -gt 0 ] || modes=(plain native sanitized nvcc)

cxx=${CXX:-g++} nvcc=${NVCC:-nvcc}
command -v "$nvcc" >/dev/null || nvcc=/usr/local/cuda/bin/nvcc
tmp=$(mktemp -d "${TMPDIR:-/tmp}/gcfast-core.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
echo 'int main() { return 0; }' >"$tmp/probe.cpp"

flags=(-std=c++17 -Wall -Wextra -pthread -fopenmp ${CXXFLAGS:-})
failed=0 ran=0

available() { # whether a mode can run here, else why not
  case $1 in
    nvcc) command -v "$nvcc" >/dev/null || { echo "no nvcc"; return 1; } ;;
    sanitized)
      command -v "$cxx" >/dev/null || { echo "no $cxx"; return 1; }
      "$cxx" -fsanitize=address,undefined "$tmp/probe.cpp" -o "$tmp/probe" 2>/dev/null ||
        { echo "$cxx has no sanitizer runtime"; return 1; } ;;
    threads)
      command -v "$cxx" >/dev/null || { echo "no $cxx"; return 1; }
      { "$cxx" -fsanitize=thread "$tmp/probe.cpp" -o "$tmp/probe" && "$tmp/probe"; } 2>/dev/null ||
        { echo "$cxx has no thread sanitizer that runs here"; return 1; } ;;
    plain | native) command -v "$cxx" >/dev/null || { echo "no $cxx"; return 1; } ;;
    *) echo "unknown mode $1: plain, native, sanitized, nvcc, threads" >&2; exit 2 ;;
  esac
}

build() { # MODE SOURCE BINARY
  case $1 in
    plain) "$cxx" "${flags[@]}" -O2 "$2" -o "$3" ;;
    native)
      local level=(-O3)
      # For a minute at -O3; with the option -O1 contracts into FMAs, too.
      [ "$2" != inertia.cpp ] || level=(-O1 -fexpensive-optimizations)
      "$cxx" "${flags[@]}" "${level[@]}" -march=native "$2" -o "$3" ;;
    sanitized)
      "$cxx" "${flags[@]}" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all "$2" -o "$3" ;;
    threads) "$cxx" "${flags[@]}" -O1 -g -fsanitize=thread "$2" -o "$3" ;;
    nvcc) "$nvcc" -std=c++17 -O1 -Werror all-warnings -x cu -gencode=arch=compute_80,code=sm_80 -c "$2" -o "$3" ;;
  esac
}

for mode in "${modes[@]}"; do
  if ! reason=$(available "$mode"); then
    echo "skipped $mode: $reason"
    continue
  fi
  for name in "${programs[@]}"; do
    source=$name.cpp
    [ "$mode" != threads ] || grep -q '"team.h"' "$source" || continue
    ran=$((ran + 1))
    # A million floats are measured as the kernels are built; other modes take fewer.
    extra=()
    case $mode.$name in
      plain.activations) extra=(--stride 16411) ;;
      threads.*) extra=(--threads) ;;
      sanitized.activations) extra=(--stride 65537) ;;
    esac
    if build "$mode" "$source" "$tmp/$name.$mode" &&
      { [ "$mode" = nvcc ] || "$tmp/$name.$mode" ${extra[@]+"${extra[@]}"} ${arguments[@]+"${arguments[@]}"}; }; then
      echo "passed $mode $name"
    else
      echo "FAILED $mode $name"
      failed=1
    fi
  done
done
[ "$failed" -eq 0 ] || exit 1
[ "$ran" -gt 0 ] || exit 77
