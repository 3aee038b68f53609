#!/usr/bin/env bash
# Trains on a Cloud TPU slice: create it, push this checkout to all its hosts, run the same command on all of them.
#
#   launch/tpu_pod.sh create NAME v5litepod-64      # accelerator types: v5litepod-64, v6e-64, v5p-128 …; SPOT=1 for a preemptible one
#   launch/tpu_pod.sh push   NAME                   # also after every change of the code
#   launch/tpu_pod.sh run    NAME --config=configs/tapo_grpo.py:qwen3_vl_4b --config.model.path=/mnt/shared/Qwen3-VL-4B --workdir=/mnt/shared/run
#   launch/tpu_pod.sh log    NAME                   # follows the first host's output
#   launch/tpu_pod.sh stop   NAME                   # asks the run to end; the same `run` command resumes from its last checkpoint
#   launch/tpu_pod.sh search NAME --corpus=/mnt/shared/passages.jsonl --index=/mnt/shared/index    # see below
#   launch/tpu_pod.sh stop-search NAME
#   launch/tpu_pod.sh delete NAME
#
# `search` starts the search service (launch/retrieval_server.py, with these flags) on the first host, where it uses no chip, and prints its
# address inside of the network, for `run NAME … --config.tools.endpoint=ADDRESS`. All hosts reach it there, as they would a service on a
# CPU machine of the same zone and network. From outside of the network it is not reached, unless a firewall rule opens its port.
#
# ZONE and PROJECT choose where (default: gcloud's own setting); RUNTIME the machine image. The model directory and the work directory
# must be on a file system that all hosts share, such as Filestore or a mounted bucket.
set -euo pipefail

usage() { sed -n '2,19s/^# \{0,1\}//p' "$0" >&2; exit 2; }

fail() { echo "error: $1" >&2; exit 1; }

[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2

root=$(cd "$(dirname "$0")/.." && pwd)
place=()
[ -n "${ZONE:-}" ] && place+=(--zone="$ZONE")
[ -n "${PROJECT:-}" ] && place+=(--project="$PROJECT")
tpu=(gcloud compute tpus tpu-vm)

command -v gcloud >/dev/null || fail "gcloud is missing: install the Google Cloud CLI and run 'gcloud init'"

# Runs a command, given as one string, on every host of the slice (or only on host WORKER).
on_hosts() { "${tpu[@]}" ssh "$name" ${place[@]+"${place[@]}"} --worker="${WORKER:-all}" --command="$1"; }

# Prints the image that a slice type needs.
runtime_of() {
  case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "no image is known for '$1': set RUNTIME" ;;
  esac
}

create() {
  [ $# -eq 1 ] || usage
  local image=${RUNTIME:-}
  [ -n "$image" ] || image=$(runtime_of "$1")
  local options=(--accelerator-type="$1" --version="$image")
  [ "${SPOT:-0}" = 1 ] && options+=(--spot)
  "${tpu[@]}" create "$name" ${place[@]+"${place[@]}"} "${options[@]}"
}

# Copies the files that git does not ignore (so no caches and no results), then installs them in an environment of their own.
push() {
  local archive
  archive=$(mktemp -t tapo_jax.XXXXXX.tar.gz)
  # shellcheck disable=SC2064  # the path is fixed now
  trap "rm -f '$archive'" EXIT
  # A tracked file that was deleted is still in git's list, and tar would fail for it.
  (
    cd "$root"
    git ls-files --cached --others --exclude-standard -z | while IFS= read -r -d '' file; do
      if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
    done | tar --null --files-from=- -czf "$archive"
  )
  "${tpu[@]}" scp "$archive" "$name:tapo_jax.tar.gz" ${place[@]+"${place[@]}"} --worker=all
  on_hosts '
    set -e
    mkdir -p tapo_jax
    # Remove files of an earlier push that this one lacks: a renamed module would stay importable.
    tar -tzf tapo_jax.tar.gz | sort > tapo_jax.files.new
    if [ -f tapo_jax.files ]; then
      comm -23 tapo_jax.files tapo_jax.files.new | (cd tapo_jax && tr "\n" "\0" | xargs -0 -r rm -f --)
    fi
    tar -xzf tapo_jax.tar.gz -C tapo_jax
    mv tapo_jax.files.new tapo_jax.files
    command -v uv >/dev/null || [ -x ~/.local/bin/uv ] || python3 -m pip install --quiet --user uv
    PATH=$HOME/.local/bin:$PATH
    [ -d venv ] || uv venv --python 3.12 venv
    VIRTUAL_ENV=$HOME/venv uv pip install --quiet -e "tapo_jax[tpu,serve]"
    venv/bin/python -c "import jax; print(jax.__version__)"
  '
}

# Starts the run on all hosts and returns; the run outlives the connection. Arguments are quoted again for the remote shell.
run() {
  [ $# -ge 1 ] || usage
  local arguments
  arguments=$(printf '%q ' "$@")
  on_hosts "
    if [ ! -d tapo_jax ] || [ ! -x venv/bin/python ]; then
      echo 'the program is not on this host: push it first' >&2; exit 1
    fi
    if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then
      echo 'a run is going on here: stop it first' >&2; exit 1
    fi
    cd tapo_jax
    nohup ../venv/bin/python launch/train.py $arguments > ../train.log 2>&1 < /dev/null &
    echo \$! > ../train.pid
  "
}

# Starts the search service on the first host, waits a little for it to listen, and prints its address. It outlives the connection.
search() {
  [ $# -ge 1 ] || usage
  local arguments
  arguments=$(printf '%q ' "$@")
  WORKER=0 on_hosts "
    if [ ! -d tapo_jax ] || [ ! -x venv/bin/python ]; then
      echo 'the program is not on this host: push it first' >&2; exit 1
    fi
    if [ -f search.pid ] && kill -0 \$(cat search.pid) 2>/dev/null; then
      echo 'a search service is running here: stop-search it first' >&2; exit 1
    fi
    rm -f search.log
    cd tapo_jax
    touch ../search.log
    nohup ../venv/bin/python launch/retrieval_server.py --host=0.0.0.0 $arguments > ../search.log 2>&1 < /dev/null &
    echo \$! > ../search.pid
    for second in \$(seq ${SEARCH_WAIT_S:-60}); do
      if grep -q 'passages at' ../search.log; then
        own=\$(hostname -I | cut -d' ' -f1)
        sed -n \"s|.* passages at http://0.0.0.0:\\([0-9]*\\)/retrieve|http://\$own:\\1|p\" ../search.log; exit 0
      fi
      if ! kill -0 \$(cat ../search.pid) 2>/dev/null; then cat ../search.log >&2; exit 1; fi
      sleep 1
    done
    echo 'it makes its index: once search.log on this host has its address, it can be used' >&2
  "
}

case $action in
  create) create "$@" ;;
  push) push ;;
  run) run "$@" ;;
  log) WORKER=${WORKER:-0} on_hosts 'tail -n 50 -f train.log' ;;
  stop) on_hosts 'if [ -f train.pid ]; then kill -TERM "$(cat train.pid)" 2>/dev/null || true; fi' ;;
  search) search "$@" ;;
  stop-search) WORKER=0 on_hosts 'if [ -f search.pid ]; then kill -TERM "$(cat search.pid)" 2>/dev/null || true; rm -f search.pid; fi' ;;
  delete) "${tpu[@]}" delete "$name" ${place[@]+"${place[@]}"} ;;
  *) usage ;;
esac
