"""Where every array lives: the device mesh and one table of path patterns.

The mesh has three axes. ``data`` splits the batch, ``fsdp`` splits the batch and the parameters
(each device holds a slice and gathers it when needed), ``tensor`` splits heads, MLP columns and the
vocabulary. The default mesh, (1, 1, 1), is one device: the same code runs there.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vbon_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# First match wins. The pattern is searched in the "/"-joined path of a leaf, so optimizer moments,
# which repeat the parameters' paths below their own, are sharded like the parameters.
# "blocks" leaves carry a leading layer axis. Everything unnamed (norms, biases, counters) is
# replicated.
TABLE: tuple[tuple[str, P], ...] = (
    (r"^population\b", P(BATCH)),  # members first: each device has whole ones
    (r"(coder|anchor|average)/(wte|head)$", P("tensor", "fsdp")),  # of a decoder or an encoder
    (r"(coder|anchor|average)/wpe$", P(None, "fsdp")),
    (r"attention/(q|k|v)/kernel$", P(None, "fsdp", "tensor", None)),  # [L, D, H, K]
    (r"attention/(q|k|v)/bias$", P(None, "tensor", None)),  # [L, H, K]
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),  # [L, H, K, D]
    (r"mlp/(up|gate)/kernel$", P(None, "fsdp", "tensor")),  # [L, D, F]
    (r"mlp/(up|gate)/bias$", P(None, "tensor")),  # [L, F]
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),  # [L, F, D]
    (r"^batch\b", P(BATCH)),  # rows first: tokens, masks, log-probs, rewards
    (r"^(cache|slots/(store|held|rows))/(k|v)\b", P(BATCH, "tensor", None, None)),  # [B, G, S, K]
    (r"^cache/(mask_BxS|trunk_BxSxD)$", P(BATCH)),  # [B, S, ...]
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first data*fsdp*tensor devices.

    One axis may be -1: it takes all devices the others leave. Axes are of type Auto (the compiler
    propagates shardings): under explicit axes flax's embedding look-ups raise.

    Raises InputError when the sizes do not fit the devices there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    bad = {k: v for k, v in sizes.items() if not (v >= 1 or v == -1)}
    if bad or sum(v == -1 for v in sizes.values()) > 1:
        raise InputError(
            f"mesh {sizes}: each axis must be at least 1, and at most one may be -1 (all the rest)"
        )
    fixed = int(np.prod([v for v in sizes.values() if v != -1]))
    sizes = {k: len(devices) // fixed if v == -1 else v for k, v in sizes.items()}
    count = int(np.prod(list(sizes.values())))
    if count < 1 or count > len(devices):
        raise InputError(
            f"mesh {sizes} needs {max(count, fixed)} devices, this process sees {len(devices)}: "
            "set mesh.data, mesh.fsdp and mesh.tensor so that their product fits"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count]
    )


def ways(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec_for(path: str, shape: Sequence[int], mesh: Any) -> P:
    """The table's PartitionSpec for a leaf; an axis that does not divide its dimension is dropped.

    Args:
      path: "/"-joined path of the leaf, e.g. "decoder/blocks/mlp/up/kernel".
      shape: shape of the leaf.
      mesh: a concrete or abstract mesh with axes ``AXES``.
    """
    spec = next((spec for pattern, spec in TABLE if re.search(pattern, path)), P())
    if len(spec) > len(shape):  # a factored or scalar moment of a sharded parameter
        return P()
    kept = []
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        ways = int(np.prod([mesh.shape[name] for name in names])) if names else 1
        kept.append(axes if ways > 1 and size % ways == 0 else None)
    while kept and kept[-1] is None:  # one spelling of a spec: jit tells P(None) from P()
        kept.pop()
    return P(*kept)


def sharding_of(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """Where the table puts one leaf."""
    return NamedSharding(mesh, spec_for(path, shape, mesh))


def path_of(key_path: Sequence[Any]) -> str:
    """The names of a jax key path joined by "/": dict keys, attributes and indices alike."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def shardings(tree: Any, mesh: Mesh, prefix: str = "") -> Any:
    """A tree of NamedShardings for ``tree`` (arrays or shape structs) from the table."""
    lead = [prefix] if prefix else []
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: NamedSharding(
            mesh, spec_for("/".join([*lead, path_of(kp)]), np.shape(x), mesh)
        ),
        tree,
    )


def place(tree: Any, mesh: Mesh, prefix: str = "") -> Any:
    """``tree`` on the mesh, sharded by the table. Use prefix="batch" for rows of a batch."""
    return jax.device_put(tree, shardings(tree, mesh, prefix))


def constrain(tree: Any, prefix: str) -> Any:
    """Inside jit: hold ``tree`` to the table's shardings of the mesh set by ``jax.set_mesh``.

    Without a mesh (a plain unit test) it returns the tree as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:  # under shard_map all is local
        return tree
    lead = [prefix] if prefix else []
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: jax.lax.with_sharding_constraint(
            x, spec_for("/".join([*lead, path_of(kp)]), np.shape(x), mesh)
        ),
        tree,
    )
