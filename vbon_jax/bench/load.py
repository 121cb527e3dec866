"""Host memory and seconds of loading a checkpoint, measured in a process of its own.

A random checkpoint of 1.8 GB is written to a temporary directory and loaded in several dtypes and
meshes. Linux only: it reads /proc.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bench.machine import Row
from vbon_jax.models import decoder, hf
from vbon_jax.models.config import DecoderConfig

# GPT-2's vocabulary and positions, 24 layers: 442 million parameters, 1.8 GB in float32.
SIZES = DecoderConfig(
    vocab_size=50257, positions=1024, layers=24, width=1152, heads=18, mlp_width=4608
)


@dataclasses.dataclass(frozen=True)
class _Noise:
    """A leaf of normal numbers, drawn a layer at a time when they are read."""

    shape: tuple[int, ...]
    dtype: Any
    scale: float
    seed: int

    def __getitem__(self, layer: Any) -> np.ndarray:
        whole = layer is Ellipsis
        rng = np.random.default_rng([self.seed, 0 if whole else layer])
        noise = rng.standard_normal(self.shape if whole else self.shape[1:], np.float32)
        noise *= self.scale
        return noise.astype(self.dtype, copy=False)


def random_checkpoint(
    path: str | os.PathLike[str],
    config: DecoderConfig = SIZES,
    *,
    like: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shard_bytes: int = 5 * 10**8,
) -> None:
    """Writes a decoder with random weights, holding about one tensor in memory.

    Args:
      path: the directory, made if absent.
      config: the decoder's configuration.
      like: the config.json to write, as of ``hf.save_decoder``; None for a GPT-2.
      dtype: dtype of the weights, "float32" or "bfloat16".
      shard_bytes: largest size of one file of weights.

    Raises:
      ValueError: if `like` does not describe config.
    """
    shapes = jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    noise = [
        _Noise(leaf.shape, np.dtype(jnp.dtype(dtype)), config.initializer_range, seed)
        for seed, leaf in enumerate(leaves)
    ]
    hf.save_decoder(
        path, config, jax.tree.unflatten(tree, noise), ids=hf.TokenIds(None, None, None),
        like=like, shard_bytes=shard_bytes,
    )  # fmt: skip


def measure(
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    devices: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
) -> dict[str, float]:
    """Measures loading a decoder on CPU devices, in a fresh process.

    Args:
      directory: directory of the checkpoint.
      dtype: dtype of the loaded parameters.
      devices: number of CPU devices to emulate.
      fsdp: size of the mesh axis "fsdp".
      tensor: size of the mesh axis "tensor".

    Returns:
      "arrays_bytes": size of all parameters, copies on several devices counted each;
      "largest_bytes": size in memory of the largest tensor (one layer of a stacked leaf);
      "beyond_bytes": peak resident memory while loading, less what was resident before and less the
      arrays; "ratio": beyond_bytes / largest_bytes; "seconds": of loading.

    Raises:
      RuntimeError: if the process failed, with what it wrote.
    """
    arguments = {"directory": str(directory), "dtype": dtype, "fsdp": fsdp, "tensor": tensor}
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "vbon_jax.bench.load", json.dumps(arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def resident_bytes(key: str) -> int:
    """Reads this process's resident memory.

    Args:
      key: "VmRSS" for what is resident now, "VmHWM" for its peak since it was reset.

    Raises:
      RuntimeError: if /proc/self/status does not say it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {key} in /proc/self/status")


def reset_peak() -> None:
    """Lets the peak of resident memory, "VmHWM", start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _measure_here(directory: str, dtype: str, fsdp: int, tensor: int) -> dict[str, float]:
    mesh = sharding.make_mesh(fsdp=fsdp, tensor=tensor)

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(mesh, sharding.spec_for(path, shape, mesh))

    # Libraries and the runtime are resident before and after: not what loading takes.
    hf.read_config(directory)
    jax.jit(jnp.zeros, static_argnums=0, out_shardings=place("", (1,)))(1).block_until_ready()
    before = resident_bytes("VmRSS")
    reset_peak()
    start = time.perf_counter()
    _, params = hf.load_decoder(directory, place=place if mesh.size > 1 else None, dtype=dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = sum(shard.data.nbytes for _, x in leaves for shard in x.addressable_shards)
    largest = max(
        x.nbytes // (len(x) if sharding.path_of(path).startswith("blocks") else 1)
        for path, x in leaves
    )
    beyond = peak - before - arrays
    return {
        "arrays_bytes": arrays,
        "largest_bytes": largest,
        "beyond_bytes": beyond,
        "ratio": beyond / largest,
        "seconds": seconds,
    }


def results() -> Iterator[tuple[str, dict[str, float]]]:
    """Measures `measure` on a checkpoint of 1.8 GB, which is removed at the end.

    Yields:
      How it was loaded, and what `measure` returned.
    """
    with tempfile.TemporaryDirectory() as directory:
        random_checkpoint(directory)
        yield "float32", measure(directory)
        yield "float32 to bfloat16", measure(directory, dtype="bfloat16")
        yield "float32, fsdp 8", measure(directory, devices=8, fsdp=8)
        yield "float32, fsdp 4, tensor 2", measure(directory, devices=8, fsdp=4, tensor=2)


def rows(how: str, result: Mapping[str, float]) -> list[Row]:
    """Makes the lines of the table.

    Args:
      how: the checkpoint was loaded.
      result: what `measure` returned.

    Returns:
      Host memory beyond the arrays, and seconds.
    """
    return [
        Row(
            "loading", f"{how}: memory beyond the arrays", result["beyond_bytes"] / 1e6, "MB",
            result["ratio"], "the largest tensor",
        ),
        Row("loading", f"{how}: {result['arrays_bytes'] / 1e6:.0f} MB", result["seconds"], "s"),
    ]  # fmt: skip


if __name__ == "__main__":  # the process of `measure`
    print(json.dumps(_measure_here(**json.loads(sys.argv[1]))))
