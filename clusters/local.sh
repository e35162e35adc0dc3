#!/usr/bin/env bash
# A Ray cluster on this machine: a head that trains nothing, and workers that are nodes of their own to Ray.
# clusters/README.md says how to use it. What it stops is what it started, and no other Ray.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: clusters/local.sh start [--workers N] [--cpus N] [--gpus N] [--ports N]
       clusters/local.sh status
       clusters/local.sh stop

  --workers N  nodes beside the head (2)
  --cpus N     CPUs of each of them (those of the machine, shared out)
  --gpus N     GPUs of each of them (0)
  --ports N    the dashboard's port (8265); N+1 and on are those of Ray's parts

KDBENCH_CLUSTER is the folder for what it remembers (/tmp/kdbench-cluster-UID): with another folder and other
ports there can be a second cluster. PYTHON is the Python that has Ray (python).
HELP
}

fail() {
  echo "local.sh: $*" >&2
  exit 1
}

state=${KDBENCH_CLUSTER:-/tmp/kdbench-cluster-$(id -u)}
# Addresses of loopback: .2 is the head's, then come the workers'. Not 127.0.0.1, for which Ray puts the machine's own in.
loopback=127.0.0
patience=120 # seconds for a node to start; it takes about ten

prepare() {
  python=$(command -v "${PYTHON:-python}") || fail "there is no ${PYTHON:-python}: activate kdbench's environment, or name one with PYTHON"
  "$python" -c 'import ray' 2>/dev/null || fail "$python has no Ray: activate kdbench's environment, or name another with PYTHON"
  # A job says `python`: that has to be this one.
  PATH=$(dirname "$python"):$PATH
  export PATH RAY_AUTH_MODE=${RAY_AUTH_MODE:-token} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
  # What Ray gives to Prometheus it gives to anybody, on all interfaces: not collected, and two servers on ports that there are not.
  export RAY_enable_metrics_collection=0 DASHBOARD_METRIC_PORT=-1 AUTOSCALER_METRIC_PORT=-1
  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS
  (umask 077 && mkdir -p "$state")
  [ -O "$state" ] || fail "$state belongs to someone else: name another folder with KDBENCH_CLUSTER"
}

# Everybody who may submit needs the token, and nobody else may read it.
make_token() {
  local file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [ "$RAY_AUTH_MODE" != token ] || [ -n "${RAY_AUTH_TOKEN:-}" ]; then return; fi
  if [ ! -s "$file" ]; then
    mkdir -p "$(dirname "$file")"
    (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
  fi
  chmod 600 "$file"
}

# When a process was started: together with its number this names it, as numbers are used again.
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

alive() {
  local pid since
  read -r pid since 2>/dev/null <"$state/$1.pid" && [ -n "$since" ] && [ "$(born "$pid")" = "$since" ]
}

nodes() { find "$state" -maxdepth 1 -name '*.pid' -printf '%f\n' 2>/dev/null | sed 's/\.pid$//' | sort -r; }

# Each node has a folder of its own: in a shared one, a node that needs a job's working directory no more would delete it for all.
launch() {
  local name=$1 number=$2
  shift 2
  setsid "$python" -m ray.scripts.scripts start --block --disable-usage-stats --object-store-memory=268435456 \
    --node-ip-address="$loopback.$((number + 2))" --temp-dir="$state/$number" "$@" >"$state/$name.log" 2>&1 </dev/null &
  echo "$! $(born $!)" >"$state/$name.pid"
}

await() {
  local waited=0
  until grep -q 'Ray runtime started' "$state/$1.log"; do
    alive "$1" || fail "$1 ended: $(tail -n 3 "$state/$1.log" | tr '\n' ' ')($state/$1.log)"
    [ "$waited" -lt "$patience" ] || fail "$1 has not started in $patience s ($state/$1.log)"
    sleep 1
    waited=$((waited + 1))
  done
}

start() {
  local workers=2 cpus='' gpus=0 ports=8265 number
  while [ $# -gt 0 ]; do
    case ${2:-} in '' | *[!0-9]*) fail "$1: expected a whole number, got '${2:-}'; clusters/local.sh --help" ;; esac
    case $1 in
      --workers) workers=$2 ;;
      --cpus) cpus=$2 ;;
      --gpus) gpus=$2 ;;
      --ports) ports=$2 ;;
      *) fail "unknown option $1; there is: --workers, --cpus, --gpus, --ports" ;;
    esac
    shift 2
  done
  [ "$workers" -gt 0 ] || fail "--workers: expected one at least, as the head trains nothing"
  if alive head; then fail "a cluster runs already: $(cat "$state/address"); clusters/local.sh stop ends it"; fi
  cpus=${cpus:-$((($(nproc) + workers - 1) / workers))}
  make_token
  rm -f "$state"/*.pid
  trap 'stop >&2' EXIT
  launch head 0 --head --port=$((ports + 1)) --num-cpus=0 --num-gpus=0 \
    --dashboard-host=127.0.0.1 --dashboard-port="$ports" --dashboard-agent-listen-port=$((ports + 3)) \
    --ray-client-server-port=$((ports + 2))
  await head
  for ((number = 1; number <= workers; number++)); do
    launch "worker-$number" "$number" --address="$loopback.2:$((ports + 1))" --num-cpus="$cpus" --num-gpus="$gpus" \
      --dashboard-agent-listen-port=$((ports + 3 + number))
  done
  for ((number = 1; number <= workers; number++)); do await "worker-$number"; done
  trap - EXIT
  echo "http://127.0.0.1:$ports" >"$state/address"
  echo "$workers workers with $cpus CPUs each, dashboard and jobs at $(cat "$state/address")"
  echo "kdbench submit experiments/quickstart.yaml --address $(cat "$state/address")"
}

status() {
  local name
  [ -n "$(nodes)" ] || fail "no cluster was started here"
  for name in $(nodes); do
    if alive "$name"; then echo "$name runs, log in $state/$name.log"; else echo "$name has ended, log in $state/$name.log"; fi
  done
  alive head || fail "the head has ended: clusters/local.sh stop, then start"
  echo "dashboard and jobs at $(cat "$state/address" 2>/dev/null || echo 'no address yet')"
}

stop() {
  local name pid waited=0
  for name in $(nodes); do # workers first
    if alive "$name"; then kill -TERM "$(cut -d' ' -f1 "$state/$name.pid")"; fi
  done
  for name in $(nodes); do
    pid=$(cut -d' ' -f1 "$state/$name.pid")
    while alive "$name" && [ "$waited" -lt 30 ]; do
      sleep 1
      waited=$((waited + 1))
    done
    if alive "$name"; then kill -KILL -- "-$pid" || true; fi # the group is the node's own
    rm -f "$state/$name.pid"
  done
  rm -f "$state/address"
  echo "stopped"
}

case ${1:-} in
  start)
    prepare
    shift
    start "$@"
    ;;
  status) status ;;
  stop) stop ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
