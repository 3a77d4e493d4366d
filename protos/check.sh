#!/usr/bin/env bash
# Checks the contract: the committed stubs are what the generator writes today, the protos are
# well formed, and what a released client sends still means the same.
set -euo pipefail
cd "$(dirname "$0")/.."

check_stubs() {
  local fresh
  fresh=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder is known now, and gone from scope at the exit
  trap "rm -rf '$fresh'" EXIT
  protos/generate.sh "$fresh"
  diff -r -x __pycache__ -x __init__.py "$fresh/adashard/wire/v1" client/src/adashard/wire/v1 ||
    { echo "The stubs are out of date: run 'make protos' and commit what it writes." >&2; exit 1; }
}

install_buf() {
  # npm leaves its own copy of the lock behind: newer than ours means up to date.
  [[ protos/node_modules/.package-lock.json -nt protos/package-lock.json ]] ||
    npm ci --prefix protos --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null
}

check_contract() {
  local buf=protos/node_modules/.bin/buf release
  "$buf" lint protos
  "$buf" format --diff --exit-code protos
  # Before the first release nobody depends on the wire, so there is nothing to break.
  release=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true)
  if [[ -n $release ]]; then
    "$buf" breaking protos --against ".git#tag=$release,subdir=protos"
  fi
}

check_stubs
if command -v npm >/dev/null; then
  install_buf
  check_contract
elif [[ ${CI:-} == true ]]; then
  echo "npm is not installed: buf cannot check the protos. Debian: apt-get install npm" >&2
  exit 1
else
  echo "protos-check: skipped buf, since npm is not installed (Debian package npm)."
fi
