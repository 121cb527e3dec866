"""What of a model is trained: all of it, its upper layers, or low-rank adapters beside its weights.

A policy is ``join(base, own)``: the reference's tree with what training changes in place of it. The
rest is held once, by both. ``own`` is the reference's

* whole tree (``layers=-1``),
* ``layers`` upper blocks and the final norm (the ``num_layers_unfrozen`` of the paper's code);
  ``base["blocks"]`` is then the pair (trunk, the reference's upper blocks), see ``divide``;
  embeddings and output matrix stay frozen,
* or adapters alone (LoRA, Hu et al. 2021): W x + (alpha / r) B A x, B starting at zero, so that the
  policy starts as the reference.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vbon_jax.models.config import Params

TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Trainable:
    """layers: upper blocks that are trained; -1 for the whole model.
    rank: of adapters on every layer's ``targets`` (of TARGETS), in place of layers; 0 for none.
    """

    layers: int = -1
    rank: int = 0
    targets: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether every parameter is trained."""
        return self.layers == -1 and self.rank == 0


def divide(params: Params, what: Trainable, layers: int) -> Params:
    """The reference's tree with ``blocks`` as (trunk, upper blocks) where only these are trained.

    Args:
      params: with ``blocks`` stacked over all ``layers``; its arrays are not used again.

    Raises ValueError where there are not so many layers, or no layer would stay frozen.
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
    """What is trained, before the first step: the base's own values, copied, in ``dtype``.

    Adapters are drawn as PEFT draws them: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B 0.

    Raises ValueError on a target the model does not have.
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
    """Whether a tree has a trunk of its own; see ``divide``."""
    return isinstance(base["blocks"], tuple)


def trains_head(own: Params) -> bool:
    """Whether the output matrix is among what is trained."""
    return "wte" in own


def join(base: Params, own: Params) -> Params:
    """The policy's tree; shares every array of ``base`` that ``own`` does not replace."""
    if trains_head(own):
        return own
    if divided(base):
        return {**base, **own, "blocks": (base["blocks"][0], own["blocks"])}
    flat = flatten_dict(base["blocks"], sep="/") | flatten_dict(own["blocks"], sep="/")
    return {**base, "blocks": unflatten_dict(flat, sep="/")}


def merged(params: Params, lora_alpha: float = 1.0) -> Params:
    """The tree of ``join`` as a plain one, its blocks in one stack, adapters added to the weights.

    Arrays stay where they are; a host that holds the model once more can afford it.
    """
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        blocks = jax.tree.map(lambda *x: jnp.concatenate(x), *blocks)
    flat = flatten_dict(blocks, sep="/")
    for path in [p for p in flat if p.endswith("/lora_a")]:
        a, b = flat.pop(path), flat.pop(path.replace("lora_a", "lora_b"))
        kernel = flat[path.replace("lora_a", "kernel")]
        added = (lora_alpha / a.shape[-1]) * jnp.einsum("LIR,LRO->LIO", *(
            x.astype(jnp.float32) for x in (a, b)))  # fmt: skip
        new = kernel.astype(jnp.float32) + added.reshape(kernel.shape)
        flat[path.replace("lora_a", "kernel")] = new.astype(kernel.dtype)
    return {**params, "blocks": unflatten_dict(flat, sep="/")}
