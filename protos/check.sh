#!/usr/bin/env bash
# Fails when the committed stubs are not what the generator writes today.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
protos/generate.sh "$fresh"
diff -r -x __pycache__ -x __init__.py "$fresh/adashard/wire/v1" client/src/adashard/wire/v1 ||
  { echo "The stubs are out of date: run 'make protos' and commit what it writes." >&2; exit 1; }
