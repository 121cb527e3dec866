#!/usr/bin/env bash
# One host, all its devices: the batch is split over them (mesh.data=-1) unless a mesh is named.
#
#   launch/local.sh run --config=configs/reviews.py --workdir=runs/reviews
#
# `vbon` is looked for on the PATH, then in .venv/bin beside this folder.
set -euo pipefail
if [[ $# -lt 1 ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
fi
# Keep compiled programs between runs of the same shapes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/vbon_jax/xla}"
vbon=$(command -v vbon || echo "$(dirname "$0")/../.venv/bin/vbon")
mesh=(--config.mesh.data=-1)
if [[ " $* " == *" --config.mesh."* ]]; then mesh=(); fi
exec "$vbon" "$@" "${mesh[@]}"
