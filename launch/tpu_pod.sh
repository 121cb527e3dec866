#!/usr/bin/env bash
# A Cloud TPU slice: the same command on all of its workers.
#
#   export ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 RUNTIME_VERSION=v2-alpha-tpuv5-lite
#   launch/tpu_pod.sh create NAME     # a queued resource; waits until it is there (SPOT=1: a spot one)
#   BUCKET=my-bucket launch/tpu_pod.sh install NAME     # this commit, and the bucket as /mnt/vbon
#   launch/tpu_pod.sh run NAME run --config=configs/reviews.py --workdir=/mnt/vbon/reviews
#   launch/tpu_pod.sh stop NAME       # it saves first; run goes on from there
#   launch/tpu_pod.sh delete NAME
#
# --dry-run before the verb prints the commands. --workdir must be on a file system that all workers
# share: the bucket, or NFS=SERVER:/SHARE of `install` in its place. The run does not need this
# shell: `run` again follows it. After exit code 75 and after a crash it is started again,
# LAUNCH_RESTARTS times at most (3). A spot slice that was taken away is deleted and created again.
set -euo pipefail

usage() {
  sed -n '2,14s/^# \{0,1\}//p' "$0"
  exit 2
}

dry=
if [[ ${1-} == --dry-run ]]; then dry=1 && shift; fi
[[ $# -ge 2 ]] || usage
verb=$1 name=$2
shift 2
where=(--zone="${ZONE:?name the zone of the slice, such as ZONE=us-west4-a}")
if [[ -n ${PROJECT-} ]]; then where+=(--project="$PROJECT"); fi

gcloud() { # the program, or its command line
  if [[ -z $dry ]]; then command gcloud "$@"; else
    printf 'gcloud'
    printf ' %q' "$@"
    echo
  fi
}

on_all() { # a script on all workers; its exit code is that of the first worker where it failed
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

create() {
  local state='' spot=()
  if [[ -n ${SPOT-} ]]; then spot=(--spot); fi
  gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="${ACCELERATOR_TYPE:?such as v5litepod-16}" \
    --runtime-version="${RUNTIME_VERSION:?such as v2-alpha-tpuv5-lite}" "${spot[@]}"
  while [[ -z $dry && $state != ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
    echo "tpu_pod.sh: $name is $state" >&2
    case $state in
      ACTIVE) ;;
      FAILED | SUSPENDED | SUSPENDING) exit 1 ;;
      *) sleep "${POLL_SECONDS:-30}" ;;
    esac
  done
}

# The workers' system has an older Python than is needed: uv brings one.
install_script() {
  cat << 'REMOTE'
set -eu
mkdir -p vbon_jax && tar -xzf vbon_jax.tar.gz -C vbon_jax && cd vbon_jax
python3 -m pip install --quiet --user uv
[ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e ".[tpu]"
REMOTE
}

bucket_script() { # Renames of folders end a checkpoint; a worker sees at once what another wrote.
  cat << 'REMOTE'
if ! command -v gcsfuse > /dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$keys" > /dev/null
  echo "deb [signed-by=$keys] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  sudo apt-get -q update && sudo apt-get -q install -y gcsfuse
fi
sudo mkdir -p /mnt/vbon && sudo chown "$(id -u)" /mnt/vbon
REMOTE
  printf 'mountpoint -q /mnt/vbon || gcsfuse --implicit-dirs --rename-dir-limit=100000 %s' \
    "--metadata-cache-ttl-secs=0 $(printf %q "$BUCKET") /mnt/vbon"
}

nfs_script() {
  cat << 'REMOTE'
command -v mount.nfs > /dev/null || { sudo apt-get -q update && sudo apt-get -q install -y nfs-common; }
sudo mkdir -p /mnt/vbon
REMOTE
  printf 'mountpoint -q /mnt/vbon || sudo mount -t nfs %q /mnt/vbon' "$NFS"
}

install() {
  local script
  script=$(install_script)
  if [[ -n ${BUCKET-} ]]; then script+=$'\n'$(bucket_script); fi
  if [[ -n ${NFS-} ]]; then script+=$'\n'$(nfs_script); fi
  folder=$(mktemp -d) # not local: the trap outlives this function
  trap 'rm -rf "$folder"' EXIT
  git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$folder/vbon_jax.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$folder/vbon_jax.tar.gz" "$name:vbon_jax.tar.gz" "${where[@]}" --worker=all
  on_all "$script"
}

run_script() { # starts the command, unless it runs already, and follows it
  printf 'set -u; cd vbon_jax; run=(.venv/bin/vbon'
  printf ' %q' "$@"
  cat << 'REMOTE'
)
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/vbon_jax/xla}"
if ! kill -0 "$(cat ~/vbon.pid 2> /dev/null)" 2> /dev/null; then
  rm -f ~/vbon.code
  : > ~/vbon.log # here, not by the program: tail may be there first
  { code=0; "${run[@]}" || code=$?; echo "$code" > ~/vbon.code; } > ~/vbon.log 2>&1 < /dev/null &
  echo "$!" > ~/vbon.pid
  disown
fi
tail -n +1 -f --pid="$(cat ~/vbon.pid)" ~/vbon.log
exit "$(cat ~/vbon.code 2> /dev/null || echo 75)"
REMOTE
}

stop_script() { # what still runs is saved and ended, or killed after two minutes
  cat << 'REMOTE'
pid=$(cat ~/vbon.pid 2> /dev/null) || exit 0
pkill -TERM -P "$pid"
timeout 120 tail -f --pid="$pid" /dev/null
pkill -KILL -P "$pid"
true
REMOTE
}

run() {
  local attempt code script flags=(--distributed)
  [[ $# -ge 1 ]] || usage
  if [[ " $* " != *" --config.mesh."* ]]; then flags+=(--config.mesh.data=-1); fi
  script=$(run_script "$@" "${flags[@]}")
  trap 'echo "tpu_pod.sh: it goes on; to end it: launch/tpu_pod.sh stop $name" >&2; exit 130' INT TERM
  for ((attempt = 0; ; attempt++)); do
    code=0
    on_all "$script" || code=$?
    case $code in
      75 | 134 | 135 | 137 | 139) ;; # lost, aborted, crashed, killed
      *) break ;;
    esac
    if ((attempt >= ${LAUNCH_RESTARTS:-3})); then break; fi
    echo "tpu_pod.sh: exit code $code: started again, $((attempt + 1)) of ${LAUNCH_RESTARTS:-3} times" >&2
    on_all "$(stop_script)"
  done
  return "$code"
}

case $verb in
  create | install | run) "$verb" "$@" ;;
  stop) on_all "$(stop_script)" ;;
  delete) gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force ;;
  *) usage ;;
esac
