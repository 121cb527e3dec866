"""Where every array lives: the device mesh and one table of path patterns.

The mesh has three axes. ``data`` splits the batch, ``fsdp`` splits the batch and the parameters
(each device holds a slice and gathers it when needed), ``tensor`` splits heads, MLP columns and the
vocabulary. The default mesh, (1, 1, 1), is one device: the same code runs there.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vbon_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
GATHERED = "gathered"  # what `gathered` gives, by name: a backward pass gathers it once more

# First match wins. The pattern is searched in the "/"-joined path of a leaf, so optimizer moments,
# which repeat the parameters' paths below their own, are sharded like the parameters.
# "blocks" leaves carry a leading layer axis. A parameter of a model that no line names is an error;
# anything else unnamed (counters, tables of rewards) is on each device.
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
    (r"/(scale|bias|lora_(a|b|gate|open)|gain(_gate)?|wtt)$", P()),  # norms, biases, adapters
    (r"(score(/out|/dense)?|pooler|value/head)/kernel$", P()),  # heads of classifiers and values
    (r"^batch\b", P(BATCH)),  # rows first: tokens, masks, log-probs, rewards
    (r"^cache/(k|v)\b", P(BATCH, "tensor", None, None)),  # [B, G, S, K]
    (r"^slots/(store|held|rows)/(k|v)\b", P(BATCH, None, "tensor", None, None)),  # devices first
    (r"^slots\b", P(BATCH)),
    (r"^cache/(mask_BxS|trunk_BxSxD)$", P(BATCH)),  # [B, S, ...]
)
MODEL = re.compile(r"\b((de|en)coder|score|value)/")


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A (data, fsdp, tensor) mesh over the first data*fsdp*tensor devices.

    One axis may be -1: it takes all devices the others leave. Axes are of type Auto (the compiler
    propagates shardings): under explicit axes flax's embedding look-ups raise. Of several TPU
    slices ``data`` alone goes from one to another, over the network between them.

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
            f"mesh {sizes} needs {max(count, fixed)} devices, there are {len(devices)}: "
            "set mesh.data, mesh.fsdp and mesh.tensor so that their product fits"
        )
    devices, types = devices[:count], (AxisType.Auto,) * 3
    tpus = devices[0].platform == "tpu"  # elsewhere a host may count as a slice
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if tpus else 1
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices)
    if sizes["data"] % slices:
        raise InputError(
            f"mesh {sizes} is over {slices} TPU slices, of which only mesh.data may go from one to "
            f"another: make it a multiple of {slices}"
        )
    inside = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    found = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices=devices)
    return Mesh(found, AXES, axis_types=types)


def ways(mesh: Mesh) -> int:
    """Over how many devices a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def spec_for(path: str, shape: Sequence[int], mesh: Any) -> P:
    """The table's PartitionSpec for a leaf; an axis that does not divide its dimension is dropped.

    Args:
      path: "/"-joined path of the leaf, e.g. "decoder/blocks/mlp/up/kernel".
      shape: shape of the leaf.
      mesh: a concrete or abstract mesh with axes ``AXES``.

    Raises:
      ValueError: a parameter of a model that no line of the table names.
    """
    spec = next((spec for pattern, spec in TABLE if re.search(pattern, path)), None)
    if spec is None and MODEL.search(path):
        raise ValueError(
            f"{path} {tuple(shape)}: no line of sharding.TABLE names this parameter; add one"
        )
    spec = spec or P()
    if len(spec) > len(shape):  # a factored or scalar moment of a sharded parameter
        return P()
    kept, sizes = [], _sizes(mesh)
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        ways = int(np.prod([sizes[name] for name in names])) if names else 1
        if len(names) > 1:
            axes = tuple(name for name in names if name not in _alone(mesh))
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
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: NamedSharding(mesh, spec_for(_below(prefix, kp), np.shape(x), mesh)), tree
    )


def _below(prefix: str, key_path: Sequence[Any]) -> str:
    return "/".join(filter(None, (prefix, path_of(key_path))))


def place(tree: Any, mesh: Mesh, prefix: str = "") -> Any:
    """``tree`` on the mesh, sharded by the table. Use prefix="batch" for rows of a batch.

    Where the mesh is that of several processes, all of them call it with the same values, and each
    gives its own devices their parts.
    """
    where = shardings(tree, mesh, prefix)
    if not mesh.is_multi_process:
        return jax.device_put(tree, where)
    return jax.tree.map(_put, tree, where)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    """One leaf on the devices of several processes."""
    if isinstance(x, jax.Array):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            of_data = _of_key_data(where, x)
            return jax.random.wrap_key_data(
                _put(jax.random.key_data(x), of_data), impl=jax.random.key_impl(x)
            )
        if not x.is_fully_addressable:
            return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def _of_key_data(where: NamedSharding, keys: jax.Array) -> NamedSharding:
    """Where the words of random keys lie that lie as ``where`` says."""
    return NamedSharding(where.mesh, P(*where.spec, *(None,) * (keys.ndim - len(where.spec))))


def fetch(tree: Any) -> Any:
    """The values of a tree's arrays on the host, of all processes: NumPy arrays.

    Parts that lie on the devices of other processes are sent; so all processes call it alike.
    """
    leaves, treedef = jax.tree.flatten(tree)
    apart = [
        i for i, x in enumerate(leaves)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    ]  # fmt: skip
    if apart:
        everywhere = NamedSharding(leaves[apart[0]].sharding.mesh, P())
        whole = _on_each(everywhere)([leaves[i] for i in apart])
        for i, x in zip(apart, whole, strict=True):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(treedef, leaves))


@lru_cache(maxsize=8)
def _on_each(everywhere: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return jax.jit(lambda arrays: arrays, out_shardings=everywhere)


def _alone(mesh: Any) -> tuple[str, ...]:
    """Axes along which each device works by itself, inside `apart` and `summed`."""
    return tuple(getattr(mesh, "manual_axes", ()))


def _sizes(mesh: Any) -> dict[str, int]:
    """Devices along each axis of a mesh, one along those where each works by itself."""
    return {name: 1 if name in _alone(mesh) else size for name, size in mesh.shape.items()}


def _divided() -> Any:
    """Inside jit: the mesh set by ``jax.set_mesh``; None where there is nothing to divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or set(_sizes(mesh).values()) == {1} else mesh


def apart(f: Callable[..., Any], shared: Any, *own: Any) -> Any:
    """Inside jit: ``f(shared, *own)`` by each device on its own rows; nothing is sent to others.

    The devices along ``tensor`` still compute what they have in common together.

    Args:
      f: gets its share of the rows of ``own``; what it returns has rows first as well.
      shared: the same for all, or divided by ``tensor`` alone.
      own: trees of arrays whose first axis the number of devices along BATCH divides.

    Returns:
      The rows of all, in the order of the devices.
    """
    mesh = _divided()
    if mesh is None or ways(mesh) == 1:
        return f(shared, *own)
    rows = P(BATCH)
    return jax.shard_map(
        f, in_specs=(P(), *[rows] * len(own)), out_specs=rows, axis_names=set(BATCH),
        check_vma=False,
    )(shared, *own)  # fmt: skip


def summed(f: Callable[[Any, Any], Any], shared: Any, rows: Any, dtype: Any = None) -> Any:
    """Inside jit: ``f(shared, rows)``, which is a sum over rows, sent once along ``data``.

    Each device adds up what its own rows give, in however many microbatches. Left to the compiler,
    every one of them is summed over all devices. It is left where ``fsdp`` and ``tensor`` both
    divide: XLA then aborts on a gather from logits (`spmd_partitioner_util.cc`, jaxlib 0.10.2).

    Args:
      f: gives sums over rows, such as gradients; paths of parameters are those of the table.
      shared: the same for all rows.
      rows: a tree of arrays with rows first.
      dtype: in which matrices are sent, as they would be from the products that they come from;
        between CPU devices all is sent as it is.
    """
    mesh = _divided()
    sizes = {} if mesh is None else _sizes(mesh)
    if sizes.get("data", 1) == 1 or min(sizes["fsdp"], sizes["tensor"]) > 1:
        return f(shared, rows)

    def together(key_path: Sequence[Any], x: jax.Array) -> jax.Array:
        path = path_of(key_path)
        is_matrix = next((any(spec) for pattern, spec in TABLE if re.search(pattern, path)), False)

        def sent_as(dtype: Any) -> Callable[[jax.Array], jax.Array]:
            return lambda x: jax.lax.psum(x.astype(dtype), "data").astype(x.dtype)

        if not is_matrix or dtype is None or x.dtype == dtype:
            return sent_as(x.dtype)(x)
        # XLA for CPU aborts on this sum in bfloat16 (`CloneAllReduce`, jaxlib 0.10.2).
        return jax.lax.platform_dependent(x, cpu=sent_as(x.dtype), default=sent_as(dtype))

    def local(shared: Any, rows: Any) -> Any:
        return jax.tree_util.tree_map_with_path(together, f(shared, rows))

    return jax.shard_map(
        local, in_specs=(P(), P("data")), out_specs=P(), axis_names={"data"}, check_vma=False
    )(shared, rows)


def in_step(x: jax.Array) -> jax.Array:
    """Inside `apart` and `summed`: a number that decides what is computed next.

    Where devices compute together along other axes it is the greatest of all, so that all do the
    same; elsewhere each decides by its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _alone(mesh) or set(_sizes(mesh).values()) == {1}:
        return x
    return jax.lax.pmax(x, _alone(mesh))


def constrain(tree: Any, prefix: str) -> Any:
    """Inside jit: hold ``tree`` to the table's shardings of the mesh set by ``jax.set_mesh``.

    Without a mesh (a plain unit test) it returns the tree as it is.
    """
    mesh = _divided()
    if mesh is None:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda kp, x: jax.lax.with_sharding_constraint(
            x, spec_for(_below(prefix, kp), np.shape(x), mesh)
        ),
        tree,
    )


def parts(axes: str | tuple[str, ...], *sizes: int) -> int:
    """Inside jit: over how many devices of mesh axes all of these sizes divide; 1 if they don't.

    Args:
      axes: "tensor", BATCH, ...
      sizes: such as the numbers of query and of key heads, which are split alike or not at all.
    """
    mesh = _divided()
    names = (axes,) if isinstance(axes, str) else axes
    ways = 1 if mesh is None else int(np.prod([_sizes(mesh)[name] for name in names]))
    return ways if all(size % ways == 0 for size in sizes) else 1


def held(x: jax.Array, *axes: Any) -> jax.Array:
    """Inside jit: hold an activation to mesh axes, or the compiler may send it about, not weights.

    Args:
      x: the activation.
      axes: for each leading dimension its mesh axes: BATCH, "tensor" or None. Rows that do not
        divide are left to the compiler, anything else that does not is whole on each device.
    """
    mesh = _divided()
    if mesh is None:
        return x
    spec: list[Any] = []
    for size, of in zip(x.shape, axes, strict=False):
        names = (of,) if isinstance(of, str) else of or ()
        names = tuple(name for name in names if name not in _alone(mesh))
        fits = size % int(np.prod([mesh.shape[name] for name in names])) == 0
        spec.append((names or None) if fits else P.UNCONSTRAINED if of == BATCH else None)
    return jax.lax.with_sharding_constraint(x, P(*spec))


def gathered(
    tree: Any, prefix: str, dtype: Any = None, layer: bool = False, whole: Sequence[str] = ()
) -> Any:
    """Inside jit: weights as a product reads them, those that ``fsdp`` divides put together.

    Their gradients are scattered again: this is ZeRO-3 (Rajbhandari et al., 2020), where the
    compiler, left alone, may gather the activations of all rows instead.

    Args:
      tree: parameters.
      prefix: where they stand in their model, "decoder/blocks".
      dtype: that products are computed in: a weight is cast before it is sent. None leaves it.
      layer: whether ``tree`` is one layer of stacked ones, without their leading axis.
      whole: names of parts, such as "attention", that ``tensor`` is not to divide either.

    Returns:
      The tree; a leaf that no axis divides as it is.
    """
    mesh = _divided()
    if mesh is None:
        return tree

    def one(key_path: Sequence[Any], x: jax.Array) -> jax.Array:
        path = _below(prefix, key_path)
        own = spec_for(path, (1, *x.shape) if layer else x.shape, mesh)
        own = P(*own[1:]) if layer else own
        gone = {"fsdp"} | ({"tensor"} if any(name in path.split("/") for name in whole) else set())
        kept = P(*(None if of in gone else of for of in own))
        if kept == own:
            return x
        return _together(x if dtype is None else x.astype(dtype), kept, own, layer)

    return jax.tree_util.tree_map_with_path(one, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _together(x: jax.Array, kept: P, own: P, layer: bool) -> jax.Array:
    x = checkpoint_name(jax.lax.with_sharding_constraint(x, kept), GATHERED)
    # What a loop reads in each trip is gathered before it: the compiler would sink it in.
    return x if layer else jax.lax.optimization_barrier(x)


def _together_fwd(x: jax.Array, kept: P, own: P, layer: bool) -> tuple[jax.Array, None]:
    return _together(x, kept, own, layer), None


def _together_bwd(kept: P, own: P, layer: bool, _: None, grad: jax.Array) -> tuple[jax.Array]:
    del kept, layer
    return (jax.lax.with_sharding_constraint(grad, own),)


_together.defvjp(_together_fwd, _together_bwd)
