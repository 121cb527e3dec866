"""Partial training: the whole model, its upper layers, or low-rank adapters (LoRA).

A policy is ``join(base, own)``: the parameter tree of the reference, ``base``, with the trained
parameters, ``own``, in place of some of it. The remaining arrays are shared by policy and
reference. ``own`` is one of

* the whole tree (``layers=-1``);
* the ``layers`` upper blocks and the final norm (``num_layers_unfrozen`` in the code of the vBoN
  paper). ``base["blocks"]`` is then the pair (trunk, upper blocks of the reference), see
  ``divide``; embeddings and output matrix stay frozen;
* adapters alone (LoRA, Hu et al., 2021): W x + (alpha / r) B A x, with B zero at first, so that the
  policy starts as the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vbon_jax.models.config import Params

TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Trainable:
    """Which parameters are trained.

    Attributes:
      layers: number of upper blocks to train; -1 for the whole model. Ignored if rank is positive.
      rank: rank of the adapters on ``targets`` in every layer; 0 for none.
      targets: the projections that have adapters, a subset of ``TARGETS``.
    """

    layers: int = -1
    rank: int = 0
    targets: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every parameter is trained."""
        return self.layers == -1 and self.rank == 0


def divide(params: Params, what: Trainable, layers: int) -> Params:
    """Splits the blocks of the reference into (trunk, upper blocks) if only the latter are trained.

    Args:
      params: the decoder's tree with ``blocks`` stacked over all layers. Do not use its arrays
        afterwards.
      what: which parameters are trained.
      layers: L, the number of layers of the model.

    Returns:
      The tree with ``blocks`` as a pair; ``params`` itself if the whole model or adapters are
      trained.

    Raises:
      ValueError: if the model has fewer layers than are to be trained, or none would stay frozen.
    """
    if what.rank or what.layers == -1:
        return params
    if not 1 <= what.layers < layers:
        raise ValueError(
            f"num_layers_unfrozen is {what.layers} and the model has {layers} layers: give 1 to "
            f"{layers - 1}, or -1 for the whole model"
        )
    cut = layers - what.layers
    parts = tuple(
        jax.tree.map(lambda x, s=part: x[s], params["blocks"])
        for part in (slice(0, cut), slice(cut, None))
    )
    return params | {"blocks": parts}


def start(base: Params, what: Trainable, key: jax.Array, dtype: str = "float32") -> Params:
    """Creates the parameters to be trained, as they are before the first step.

    Without adapters these are copies of the base's own values. Adapters are initialized as in PEFT:
    A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero.

    Args:
      base: the reference's tree, from ``divide``.
      what: which parameters are trained.
      key: random key for the adapters.
      dtype: dtype of the result, "float32" or "bfloat16".

    Returns:
      The tree ``own`` of the module docstring.

    Raises:
      ValueError: if the model does not have a target of the adapters.
    """
    if not what.rank:
        own = base if what.layers == -1 else {"blocks": base["blocks"][1], "ln_f": base["ln_f"]}
        return jax.tree.map(lambda x: jnp.array(x, dtype), own)  # array, not asarray: a copy
    flat: dict[str, jax.Array] = {}
    kernels = flatten_dict(base["blocks"], sep="/")
    for target in what.targets:
        found = [path for path in kernels if path.endswith(f"/{target}/kernel")]
        if not found:
            known = sorted(p.split("/")[-2] for p in kernels if p.endswith("/kernel"))
            raise ValueError(f"LoRA target {target!r}: the model has {', '.join(known)}")
        shape = kernels[found[0]].shape
        inputs = 2 if target == "out" else 1  # [L, H, K, D], else [L, D, ...]
        size = int(np.prod(shape[1 : 1 + inputs]))
        features = int(np.prod(shape[1 + inputs :]))
        key, here = jax.random.split(key)
        a = jax.random.uniform(here, (shape[0], size, what.rank), dtype, -1, 1) * size**-0.5
        path = found[0].removesuffix("kernel")
        flat |= {
            f"{path}lora_a": a,
            f"{path}lora_b": jnp.zeros((shape[0], what.rank, features), dtype),
        }
    return {"blocks": unflatten_dict(flat, sep="/")}


def divided(base: Params) -> bool:
    """Returns whether a tree's blocks are split into trunk and upper blocks; see ``divide``."""
    return isinstance(base["blocks"], tuple)


def trains_head(own: Params) -> bool:
    """Returns whether the trained parameters include the output matrix."""
    return "wte" in own


def join(base: Params, own: Params) -> Params:
    """Combines the reference's tree and the trained parameters into the policy's tree.

    Args:
      base: the reference's tree, from ``divide``.
      own: the trained parameters, from ``start``.

    Returns:
      The policy's tree, which shares every array of ``base`` that ``own`` does not replace.
    """
    if trains_head(own):
        return own
    if divided(base):
        return {**base, **own, "blocks": (base["blocks"][0], own["blocks"])}
    flat = flatten_dict(base["blocks"], sep="/") | flatten_dict(own["blocks"], sep="/")
    joined = {**base, "blocks": unflatten_dict(flat, sep="/")}
    if "ln_f" in own:  # the gain of a family
        joined["ln_f"] = {**base["ln_f"], **own["ln_f"]}
    return joined


def has_adapters(params: Params) -> bool:
    """Returns whether a policy's tree has adapters."""
    return any(path.endswith("/lora_a") for path in flatten_dict(_stack(params), sep="/"))


def merged(params: Params, lora_alpha: float = 1.0) -> Params:
    """Merges a policy's tree into a plain one: one stack of blocks, adapters added to the weights.

    The sums are made in float32, and stored in the wider dtype of weights and adapters: bfloat16
    would round most of a small update away, see ``merge_loss``. Likewise a stack of trained and
    frozen blocks has the wider dtype of the two. Arrays stay on their devices, which must have room
    for a second copy of the model.

    Args:
      params: the policy's tree, from ``join``.
      lora_alpha: adapters of rank r are added with the factor lora_alpha / r.

    Returns:
      A tree as ``decoder.init`` creates it.
    """
    flat = flatten_dict(_stack(params), sep="/")
    for path, exact, dtype in list(_sums(flat, lora_alpha)):
        flat[path] = exact.astype(dtype)
    plain = {path: leaf for path, leaf in flat.items() if "/lora_" not in path}
    found = {**params, "blocks": unflatten_dict(plain, sep="/")}
    if "gain" in params.get("ln_f", {}):
        ln_f = dict(params["ln_f"])
        gain, scale = ln_f.pop("gain"), ln_f["scale"]
        dtype = jnp.promote_types(scale.dtype, gain.dtype)
        found["ln_f"] = ln_f | {"scale": (scale.astype(jnp.float32) + gain).astype(dtype)}
    return found


def merge_loss(params: Params, lora_alpha: float = 1.0) -> float:
    """Measures what ``merged`` loses of the adapters' update W' - W.

    Args:
      params: as for ``merged``.
      lora_alpha: as for ``merged``.

    Returns:
      ||stored - W'|| / ||W' - W||, Frobenius norms over all matrices with adapters; 0.0 where these
      are stored in float32, or no adapter has moved.
    """
    flat = flatten_dict(_stack(params), sep="/")
    lost = moved = 0.0
    for path, exact, dtype in _sums(flat, lora_alpha):
        lost += float(jnp.sum((exact.astype(dtype).astype(jnp.float32) - exact) ** 2))
        moved += float(jnp.sum((exact - flat[path].astype(jnp.float32)) ** 2))
    return (lost / moved) ** 0.5 if moved else 0.0


def _stack(params: Params) -> Params:
    """Returns the blocks of a policy's tree as one stack, adapters beside their weights."""
    blocks = params["blocks"]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *blocks) if divided(params) else blocks


def _sums(
    flat: dict[str, jax.Array], lora_alpha: float
) -> Iterator[tuple[str, jax.Array, jnp.dtype]]:
    """Yields each kernel with an adapter: its path, its sum in float32, and the wider dtype."""
    for path, a in flat.items():
        if not path.endswith("/lora_a"):
            continue
        place = path.removesuffix("lora_a")
        b, kernel = flat[f"{place}lora_b"], flat[f"{place}kernel"]
        added = (lora_alpha / a.shape[-1]) * jnp.einsum("LIR,LRO->LIO", *(
            x.astype(jnp.float32) for x in (a, b)))  # fmt: skip
        exact = kernel.astype(jnp.float32) + added.reshape(kernel.shape)
        yield f"{place}kernel", exact, jnp.promote_types(kernel.dtype, a.dtype)
