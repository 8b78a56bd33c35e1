#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Measures the CPU shapes of tests/cases/shapes.json in fp32 and bf16 with `penstock bench`, and
# leaves the rows in benchmarks/results, from which scripts/update_readme.py makes README's table.
# Run it on an idle machine, with Penstock and torch installed; options are passed on.
set -eu
cd "$(dirname "$0")/.."
for dtype in fp32 bf16; do
  penstock bench --dtype "$dtype" --repeats 15 --json "benchmarks/results/cpu-$dtype.jsonl" "$@"
done
