#!/usr/bin/env bash
# Writes the Python stubs of protos/ below the folder given (client/src in the repository).
set -euo pipefail
cd "$(dirname "$0")/.."
.venv-protoc/bin/python -m grpc_tools.protoc -I protos \
  --plugin=protoc-gen-mypy=.venv-protoc/bin/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=.venv-protoc/bin/protoc-gen-mypy_grpc \
  --python_out="$1" --grpc_python_out="$1" --mypy_out=quiet:"$1" --mypy_grpc_out=quiet:"$1" \
  protos/adashard/wire/v1/*.proto
