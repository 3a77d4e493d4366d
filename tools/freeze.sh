#!/usr/bin/env bash
# Writes constraints.txt: what pip chooses today for both distributions and the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT

"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# shellcheck disable=SC2086  # TORCH may carry options for pip
pip install --quiet ${TORCH:-torch==2.13.0}
pip install --quiet -e client -e server -r requirements-dev.txt

{
  sed '/^[^#]/,$d' constraints.txt
  # A local version label (+cpu) names a build of one index, not a version.
  {
    pip freeze --all --exclude-editable | grep -vE '^(pip|wheel|async-timeout)==' | sed 's/+.*//'
    # What redis needs before Python 3.11.3, which is mostly not the Python at hand.
    echo "async-timeout==5.0.1"
  } | LC_ALL=C sort -f
} >"$venv/constraints.txt"
cp "$venv/constraints.txt" constraints.txt
