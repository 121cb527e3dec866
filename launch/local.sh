#!/usr/bin/env bash
# One host, all its devices: the batch is split over them (mesh.data=-1) unless a mesh is named.
#
#   launch/local.sh run --config=configs/reviews.py --workdir=runs/reviews
#   launch/local.sh -n 4 run --config=configs/reviews.py --workdir=runs/reviews
#
# -n 4 makes it one run of 4 processes, which share the GPUs evenly; a sweep becomes 4 processes of
# a quarter of its units each. A process that fails ends the others, which have LAUNCH_GRACE seconds
# (60) for it, and its exit code is returned. After exit code 75 and after a crash all are started
# again, LAUNCH_RESTARTS times at most (3). Lines of the processes after the first begin with "[1] ".
# `vbon` is looked for on the PATH, then in .venv/bin beside this folder.
set -euo pipefail

usage() {
  sed -n '2,11s/^# \{0,1\}//p' "$0"
  exit 2
}

refuse() {
  echo "local.sh: $1" >&2
  exit 2
}

n=1
case "${1-}" in
  -n) n=${2-} && shift "$(($# < 2 ? $# : 2))" ;;
  -n*) n=${1#-n} && shift ;;
esac
[[ $# -ge 1 ]] || usage
[[ $n =~ ^[1-9][0-9]{0,3}$ ]] || refuse "-n $n: write a number of processes, such as -n 4"

# Keep compiled programs between runs of the same shapes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vbon_jax/xla}"
vbon=$(command -v vbon || echo "$(dirname "$0")/../.venv/bin/vbon")
mesh=(--config.mesh.data=-1)
if [[ " $* " == *" --config.mesh."* ]]; then mesh=(); fi
if ((n == 1)); then exec "$vbon" "$@" "${mesh[@]}"; fi

gpus=()
if [[ ${JAX_PLATFORMS-} != cpu ]] && command -v nvidia-smi > /dev/null; then
  mapfile -t gpus < <(nvidia-smi -L 2> /dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then IFS=, read -ra gpus <<< "$CUDA_VISIBLE_DEVICES"; fi
fi
each=$((${#gpus[@]} / n))
((each * n == ${#gpus[@]})) || refuse "-n $n: the ${#gpus[@]} GPUs of this host do not divide by it"

pids=()     # of the processes, each the leader of a process group of its own
printers=() # of those that put a process's number before its lines
signal=     # the first that came to this script

free_port() { # below the ports that the system gives to connections by itself
  local port
  while port=$((20000 + RANDOM % 12000)); (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do :; done
  echo "$port"
}

prefixed() { # process I: its lines, whoever is signalled beside it
  local line
  trap '' INT TERM HUP
  while IFS= read -r line || [[ -n $line ]]; do printf '[%d] %s\n' "$1" "$line"; done >&2
}

start() { # process I of n, with the arguments that follow
  local i=$1 out=1 err=2 env=()
  shift
  if ((each)); then env=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i * each:each}")"); fi
  if ((i)); then
    exec {out}> >(prefixed "$i")
    printers+=($!)
    err=$out
  fi
  set -m # a Ctrl-C of the terminal then reaches this script alone, which hands it on once
  env "${env[@]}" "$vbon" "$@" < /dev/null 1>&"$out" 2>&"$err" &
  set +m
  pids+=($!)
  if ((i)); then exec {out}>&-; fi
}

hand_on() { # a signal to all that still run
  local pid
  for pid in "${pids[@]}"; do kill -"$1" "$pid" 2> /dev/null || true; done
}
trap 'signal=${signal:-INT}; hand_on INT' INT
trap 'signal=${signal:-TERM}; hand_on TERM' TERM HUP

lost() { # whether an exit code asks for the same command again: 75, aborted, killed, crashed
  [[ $1 == 75 || $1 == 134 || $1 == 135 || $1 == 137 || $1 == 139 ]]
}

supervise() { # until all ended: sets `code` to that of the first that failed, and ends the others
  local i ended status deadline=
  code=0
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      if kill -0 "${pids[i]}"; then continue; fi
      status=0 ended=${pids[i]}
      wait "$ended" || status=$?
      kill -KILL -- "-$ended" || true # what it may have left behind
      unset "pids[i]"
      if [[ -z $deadline ]] && ((status)) && { ((code == 0)) || lost "$code"; }; then code=$status; fi
    done
    if ((code)) && [[ -z $deadline ]]; then
      deadline=$((SECONDS + ${LAUNCH_GRACE:-60}))
      if [[ -z $signal ]]; then hand_on TERM; fi # a second signal would end them without saving
    fi
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then
      for i in "${!pids[@]}"; do kill -KILL -- "-${pids[i]}" || true; done
    fi
    sleep 0.1 || true
  done
  wait "${printers[@]}" || true
} 2> /dev/null # of bash, which reports a job that was killed

for ((attempt = 0; ; attempt++)); do
  printers=()
  flags=(--coordinator="127.0.0.1:$(free_port)" --num_processes="$n")
  for ((i = 0; i < n; i++)); do
    if [[ -n $signal ]]; then break; fi
    if [[ $1 == sweep ]]; then flags=(--shard="$i/$n"); else flags[2]=--process_id=$i; fi
    start "$i" "$@" "${mesh[@]}" "${flags[@]}"
  done
  supervise
  if [[ -n $signal ]] || ! lost "$code" || ((attempt >= ${LAUNCH_RESTARTS:-3})); then break; fi
  echo "local.sh: a process was lost (exit code $code): all start again," \
    "$((attempt + 1)) of ${LAUNCH_RESTARTS:-3} times" >&2
done
exit "$code"
