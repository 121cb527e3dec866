"""Prints what a run will need of each device, before anything is allocated.

For a TPU slice the run's programs are compiled by the slice's own compiler (``topology``). For
another mesh larger than this machine they are compiled for as many CPU devices (``pretend``), whose
temporaries are near those of an accelerator, not equal to them.

What a runtime and its libraries take for themselves (code, compiled programs, a GPU's context) is
not in the figures: a few hundred MB, whatever the model.
"""

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.extend.backend import clear_backends
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from vbon_jax import sharding
from vbon_jax.config import Config
from vbon_jax.progress import log
from vbon_jax.stages import topology
from vbon_jax.stages.base import refuse_uneven
from vbon_jax.stages.need import Need, need
from vbon_jax.stages.workdir import Workdir

GIB = 2**30


def pretend(devices: int) -> None:
    """Lets this machine stand for ``devices`` of them; where it has fewer, they are CPU devices.

    Before any array is made: none outlives a change of devices.
    """
    if len(jax.devices()) < devices:
        clear_backends()
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def device_bytes(s: Config) -> int:
    """Memory of a device: ``memory.device_gib``, or what this machine's first device reports.

    CPU devices report nothing and share what the machine has.
    """
    if s.memory.device_gib:
        return int(s.memory.device_gib * GIB)
    found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if found is None:
        pages: Callable[[str], int] = os.sysconf
        found = pages("SC_PAGE_SIZE") * pages("SC_PHYS_PAGES") // jax.device_count()
    return int(found)


SMALLER = {
    "update": "set memory.remat=full, lower memory.chunk, or raise memory.accumulate, which holds "
    "one more array of gradients and helps where activations take more",
    "gradient steps": "lower offline.batch_size, set memory.remat=full, lower memory.chunk",
    "start": "lower offline.batch_size, set memory.remat=full, lower memory.chunk",
    "rollout": "lower train.batch_size, or set memory.rollout_rows",
    "log pi_ref": "lower sampling.batch_size",
    "checkpoint": "train less of it (train.num_layers_unfrozen, lora.rank)",
}


def verdict(found: Need, limit: int) -> str:
    """One sentence: does it fit, and if not, what is too large and what to do."""
    if found.peak <= limit:
        return f"fits: {found.peak / GIB:.2f} of {limit / GIB:.2f} GiB a device"
    held = sum(found.held.values())
    if held > limit:
        what = f"what is held alone ({max(found.held, key=found.held.__getitem__)} most)"
        advice = (
            "split it over more devices (mesh.fsdp, mesh.tensor), store it in bfloat16 (memory.*_"
            "dtype), or train less of it (train.num_layers_unfrozen, lora.rank)"
        )
    elif found.train <= limit:
        what, advice = "stage 'sample'", "lower sampling.batch_size"
    else:
        phase = max(found.phases, key=found.phases.__getitem__)
        what = f"the phase {phase!r}"
        advice = SMALLER.get(phase, "lower reward.max_tokens or train.batch_size")
    return (
        f"does not fit: {found.peak / GIB:.2f} GiB a device are needed and there are "
        f"{limit / GIB:.2f}; {what} is too large: {advice}"
    )


def tables(found: Need, mesh: Mesh, limit: int) -> Sequence[Table]:
    """What ``vbon plan`` prints."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())

    def table(title: str, unit: str, scale: float, rows: Mapping[str, float]) -> Table:
        made = Table(title=title, min_width=len(title))  # or the title would be broken
        made.add_column("what")
        made.add_column(unit, justify="right")
        for name, size in rows.items():
            made.add_row(name, f"{size / scale:,.1f}")
        return made

    held = table(f"held by each device ({shape})", "MiB", 2**20, found.held)
    held.add_section()
    held.add_row("together", f"{sum(found.held.values()) / 2**20:,.1f}")
    phases = table("peak beyond that, by phase", "MiB", 2**20, found.phases)
    if found.cache:
        phases.add_section()
        phases.add_row("keys and values, in rollout", f"{found.cache / 2**20:,.1f}")
    stages = {"stage sample": found.sample, "stage train": found.train}
    together = table(f"all together, of {limit / 2**20:,.0f} MiB a device", "MiB", 2**20, stages)
    made = [held, phases, together]
    if found.sent:
        made.append(table("sent by each device, once a phase", "MiB", 2**20, found.sent))
    if found.flops:
        made.append(table("operations of each device, by formula", "GFLOP", 1e9, found.flops))
    return made


def run(config: Config, workdir: Workdir, slice_name: str | None = None) -> None:
    """Prints the memory a run needs on each device; touches no workdir.

    Args:
      config: the run's settings.
      workdir: its folder, of which only what is there is read.
      slice_name: a TPU slice to plan for, "v5e:16x16"; None for devices like this machine's.
    """
    m = config.mesh
    wanted = m.data * m.fsdp * m.tensor
    limit: float
    if slice_name is not None:
        there = topology.devices(slice_name)
        mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor, there)
        limit = GIB * (config.memory.device_gib or topology.memory_gib(slice_name, there))
    else:
        if wanted > 1:  # no axis takes the rest: a mesh that need not be here
            pretend(wanted)
        mesh = sharding.make_mesh(m.data, m.fsdp, m.tensor)
        limit = device_bytes(config)
    refuse_uneven(config, mesh)
    began = time.monotonic()
    with warnings.catch_warnings():  # a cache of programs can hold them, not give them back
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        found = need(config, mesh, workdir)
    if slice_name is not None:
        log(f"plan: compiled for {mesh.size} devices in {time.monotonic() - began:.0f} s")
    console = Console()
    for table in tables(found, mesh, int(limit)):
        console.print(table)
    console.print(verdict(found, int(limit)), highlight=False, soft_wrap=True)
