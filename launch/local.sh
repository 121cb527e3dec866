#!/usr/bin/env bash
# One host, all its devices: the batch is split over them (mesh.data=-1).
#
#   launch/local.sh run --config=configs/reviews.py --workdir=runs/reviews
#
# Several hosts run the same command with, in addition,
#   --coordinator=HOST0:PORT --num_processes=N --process_id=I
set -euo pipefail
if [[ $# -lt 1 ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
# Keep compiled programs between runs of the same shapes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vbon_jax/xla}"
exec vbon "$@" --config.mesh.data=-1
