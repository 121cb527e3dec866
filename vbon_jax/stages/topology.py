"""TPU slices that are not here: libtpu compiles for them on any machine."""

import importlib
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from vbon_jax.errors import InputError

# GiB of a device's memory (https://cloud.google.com/tpu/docs/system-architecture-tpu-vm).
MEMORY = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}

# libtpu asks these of the machine it is on where they are not set.
_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str) -> Sequence[jax.Device]:
    """The devices of a slice, to compile for.

    Args:
      name: version and shape, "v5e:16x16".

    Raises:
      InputError: libtpu is not installed, or knows no such slice.
    """
    try:
        importlib.import_module("libtpu")
    except ImportError as error:
        raise InputError(
            f"--topology={name} needs libtpu, the compiler for TPUs, which needs no TPU: pip "
            'install -e ".[tpu]"'
        ) from error
    for key, value in _HERE.items():
        os.environ.setdefault(key, value)
    try:
        found: Sequence[jax.Device] = topologies.get_topology_desc(
            platform="tpu", topology_name=name
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"--topology={name}: libtpu says {str(error).partition(': ')[2].strip()!r}; write "
            "version and shape, such as v5e:4x4, v6e:16x16 or v5p:4x4x4"
        ) from error
    return found


def memory_gib(name: str, found: Sequence[jax.Device]) -> int:
    """GiB of memory that each device of a slice has.

    Raises:
      InputError: it is not known here.
    """
    kind = found[0].device_kind
    if kind not in MEMORY:
        raise InputError(
            f"--topology={name}: the memory of {kind} is not known here; set memory.device_gib"
        )
    return MEMORY[kind]
