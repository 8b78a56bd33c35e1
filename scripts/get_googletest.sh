#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts GoogleTest's sources where cmake/FindGTest.cmake looks, without root and without a version
# control host: Debian and Ubuntu ship them as the package `googletest`, which apt downloads from
# the sources this machine is set up with, and dpkg-deb unpacks under build/googletest. Does
# nothing if sources are there already. The Makefile calls it; so may you.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly dest="$PWD/build/googletest"
readonly inside=usr/src/googletest/googletest/src/gtest-all.cc

if [[ -f "/$inside" || -f "$dest/$inside" ]]; then
  exit 0
fi
if [[ -n "${PENSTOCK_GOOGLETEST_DIR:-}" && -f "$PENSTOCK_GOOGLETEST_DIR/src/gtest-all.cc" ]]; then
  exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  echo "get_googletest: no apt-get on this system. Install GoogleTest with the system's package" \
       "manager, or set PENSTOCK_GOOGLETEST_DIR to its sources." >&2
  exit 1
fi

mkdir -p "$dest"
fetch() {
  (cd "$dest" && apt-get "$@" download googletest)
}

# The machine's own package lists serve if it has any; a fresh container has none, and then a
# private set is fetched, which needs no root.
if ! fetch -qq >"$dest/apt.log" 2>&1; then
  echo "get_googletest: fetching package lists"
  mkdir -p "$dest/apt/lists/partial" "$dest/apt/cache/archives/partial"
  private=(-qq -o "Dir::State::lists=$dest/apt/lists" -o "Dir::Cache=$dest/apt/cache")
  if ! { apt-get "${private[@]}" update && fetch "${private[@]}"; } >>"$dest/apt.log" 2>&1; then
    cat "$dest/apt.log" >&2
    echo "get_googletest: apt could not download the package googletest (log above). Install" \
         "libgtest-dev, or set PENSTOCK_GOOGLETEST_DIR to GoogleTest's sources." >&2
    exit 1
  fi
fi
dpkg-deb -x "$dest"/googletest_*.deb "$dest"
rm -rf "$dest"/googletest_*.deb "$dest/apt" "$dest/apt.log"
if [[ ! -f "$dest/$inside" ]]; then
  echo "get_googletest: the package googletest holds no $inside" >&2
  exit 1
fi
echo "get_googletest: sources in build/googletest"
