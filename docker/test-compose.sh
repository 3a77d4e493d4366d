#!/usr/bin/env bash
# Builds the images, brings the stack of docker-compose.yml up, trains through it with the two
# workers of the profile `demo` while one shard is killed, reads what REST says about it, and takes
# everything down again.
# Uses its own project name, ports and volumes: a stack that runs already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

STEPS=${DEMO_STEPS:-60}
WAIT_S=300

fail() { echo "test-compose: $*" >&2; exit 1; }
say() { echo "test-compose: $*"; }
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

find_tools() {
  command -v python3 >/dev/null || fail "python3 is missing"
  command -v docker >/dev/null || fail "docker is missing: install Docker Engine (Debian: docker.io)"
  docker version >/dev/null 2>&1 ||
    fail "docker does not reach an engine at ${DOCKER_HOST:-the default socket}: start it, or set DOCKER_HOST"
  if docker compose version >/dev/null 2>&1; then COMPOSE=(docker compose)
  elif command -v docker-compose >/dev/null; then COMPOSE=(docker-compose)
  else fail "Compose is missing: install the plugin docker-compose-v2, or docker-compose"; fi
}

compose() { "${COMPOSE[@]}" --project-name "$PROJECT" "$@"; }

explain() {
  local container
  compose --profile demo logs --tail=40 2>&1
  for container in $(compose ps -a -q); do
    docker inspect --format '{{.Name}}: {{json .State.Health}}' "$container"
  done
}

take_down() {
  local outcome=$?
  trap - EXIT
  if ((outcome)); then explain || true; fi
  compose --profile demo down --volumes --timeout 40 >/dev/null 2>&1 || true
  ((outcome)) && echo "test-compose: FAILED" >&2
  exit "$outcome"
}

# rest PATH EXPRESSION: prints EXPRESSION of the answer; fails where the answer is no 200.
rest() {
  python3 - "http://127.0.0.1:$HTTP_PORT$1" "$2" <<'PYTHON'
import json, sys, urllib.request
url, expression = sys.argv[1:]
with urllib.request.urlopen(url, timeout=10) as reply:
    print(eval(expression, {"answer": json.load(reply)}))
PYTHON
}

# expect TEXT PATH EXPRESSION: EXPRESSION of the answer is true.
expect() {
  local found
  found=$(rest "$2" "$3") || fail "$2 does not answer"
  [[ $found == True ]] || fail "not so: $1 ($2: $3 is $found)"
  say "  $1"
}

wait_until_ready() {
  local end=$((SECONDS + WAIT_S))
  until rest /readyz 'answer["ready"]' >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "not ready after $WAIT_S s"
    sleep 1
  done
}

# kill_a_shard STEP: kills its process at or after STEP; Compose would not restart a stopped container.
kill_a_shard() {
  local end=$((SECONDS + WAIT_S))
  until [[ $(rest /api/v1/jobs "any(job['step'] >= $1 for job in answer['items'])" 2>/dev/null) == True ]]; do
    ((SECONDS < end)) || fail "no step $1 after $WAIT_S s"
    sleep 0.2
  done
  # The end of the container may take this command with it; RestartCount tells whether it came to it.
  compose exec -T shard-1 python - <<'PYTHON' || true
import os, pathlib, signal
children = pathlib.Path("/proc/1/task/1/children").read_text().split()
os.kill(int(children[0]), signal.SIGKILL)  # of the init process
PYTHON
}

train() {
  compose --profile demo up -d worker-0 worker-1
  kill_a_shard 10
  local worker container code
  for worker in worker-0 worker-1; do
    container=$(compose --profile demo ps -a -q "$worker")
    code=$(timeout "$WAIT_S" docker wait "$container") || fail "$worker did not end in $WAIT_S s"
    [[ $code == 0 ]] || fail "$worker ended with $code"
  done
}

read_answers() {
  local job restarts
  restarts=$(docker inspect --format '{{.RestartCount}}' "$(compose ps -a -q shard-1)")
  [[ $restarts == 1 ]] || fail "the shard that was killed was restarted $restarts times"
  say "  the shard that was killed has come back"
  expect "the process answers" /healthz 'answer["status"] == "ok"'
  expect "two shards are there" /api/v1/cluster 'answer["shard_count"] == 2'
  expect "both shards hold weights" /api/v1/shards 'all(shard["weight_bytes"] > 0 for shard in answer["items"])'
  expect "membership is kept in Redis" /api/v1/cluster 'answer["registry"] == "redis"'
  job=$(rest /api/v1/jobs 'answer["items"][0]["name"]') || fail "there is no job"
  expect "the job has taken its steps" "/api/v1/jobs/$job" "answer['step'] >= $STEPS"
  expect "its state is smaller than Adam's" "/api/v1/jobs/$job/state" '0 < answer["total_bytes"] < answer["adam_bytes"]'
  expect "its steps carry a loss" "/api/v1/jobs/$job/steps" 'answer["items"][-1]["loss"] is not None'
}

read_checkpoints() {
  compose exec -T coordinator adashard checkpoint verify /var/lib/adashard || fail "a checkpoint is damaged, or there is none"
  say "  every byte of the checkpoint in the volume is right"
}

# SIGTERM drains: whoever is stopped ends by itself, in time and with 0.
stop_cleanly() {
  local services=(shard-0 shard-1 coordinator) service container code
  local -A containers
  for service in "${services[@]}"; do containers[$service]=$(compose ps -a -q "$service"); done
  compose stop "${services[@]}"
  for service in "${services[@]}"; do
    container=${containers[$service]}
    code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
    [[ $code == 0 ]] || fail "$service ended with $code when it was stopped"
  done
}

find_tools
PROJECT=adashard-test-$$
HTTP_PORT=$(free_port)
GRPC_PORT=$(free_port)
DEMO_STEPS=$STEPS
CHECKPOINT_EVERY=25
export HTTP_PORT GRPC_PORT DEMO_STEPS CHECKPOINT_EVERY
trap take_down EXIT

say "building ($(docker version --format '{{.Server.Version}}'), ${COMPOSE[*]} $("${COMPOSE[@]}" version --short))"
compose config --quiet
compose build coordinator # the one image
say "starting"
compose up -d redis coordinator shard-0 shard-1
wait_until_ready
say "training $STEPS steps with two workers, and killing a shard"
train
say "reading REST"
read_answers
read_checkpoints
say "stopping"
stop_cleanly
say "passed"
