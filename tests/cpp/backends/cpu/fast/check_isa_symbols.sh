#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# check_isa_symbols.sh NM OBJECT...: an object compiled for more than the baseline instruction set
# may define its one table function and nothing else that the linker can see. Otherwise an inline
# function compiled there, AVX-512 and all, could stand in for the baseline copy everywhere.
set -eu
nm=$1
shift
checked=0
failed=0
for object in "$@"; do
  case $object in
    */fast/isa/*) ;;
    *) continue ;;
  esac
  checked=$((checked + 1))
  # Capital letters but U are symbols seen by others; w and v are weak.
  seen=$("$nm" -C --defined-only "$object" | awk '$2 ~ /^[A-TV-Zwvu]$/' | grep -v '_kernels()$' || true)
  if [ -n "$seen" ]; then
    echo "$object defines more than its table:"
    echo "$seen"
    failed=1
  fi
done
[ "$checked" -ge 1 ] || { echo "no object of fast/isa among the arguments"; exit 1; }
exit "$failed"
