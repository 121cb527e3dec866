"""One policy for every n: low-rank adapters that a gate opens as far as n asks for.

For every n the policy is the reference with weights (LoRA, Hu et al., 2021, is the case g = 1)

    W_n = W + (alpha / r) B diag(g(log n)) A,    g_k(t) = sum_j C_jk phi_j(t)        k = 1, ..., r
    phi_j(t) = (tanh((t - c_j) / w) + tanh(c_j / w)) / 2,    c_j = j w,  w = log(top) / J

so that g(0) = 0, and n = 1 is the reference to the bit, whatever is learned. The gate has the
coefficients C of its own for each projection of each layer, which are trained with A and B. At
first rank k has the feature j = k mod J alone: the adapter of a larger n has that of a smaller one
in it, and more.

What the final norm gives bounds the logits, whatever the blocks do, so its scale has a gate too:

    scale_n = scale + sum_j c_j phi_j(log n),

with c_j of D numbers, 0 at first (``gain_gate`` [J, D] in ``ln_f``, opened as ``gain`` [G, D]).

Beside ``lora_a`` [L, in, r] and ``lora_b`` [L, r, out] stands ``lora_gate`` [L, J, r]. Where rows
of a batch have an n each, ``opened`` puts ``lora_open`` [L, G, r], the gates of G groups of
adjacent rows, in its place; of one n, ``fixed`` makes plain adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from vbon_jax.models.config import Params

FEATURES = 8  # J
GATE, OPEN = "lora_gate", "lora_open"
GAIN_GATE, GAIN = "gain_gate", "gain"


def features(n: ArrayLike, top: float) -> jax.Array:
    """The J features of a gate.

    Args:
      n: of best-of-n, at least 1; float32 of any shape.
      top: the largest n that is trained for, above 1; beyond it they hardly change.

    Returns:
      float32 [..., J], all 0 at n = 1.
    """
    width = math.log(top) / FEATURES
    centers_J = width * jnp.arange(FEATURES, dtype=jnp.float32)
    t = jnp.log(jnp.asarray(n, jnp.float32))[..., None]
    phi = (jnp.tanh((t - centers_J) / width) + jnp.tanh(centers_J / width)) / 2
    return jnp.where(t > 0, phi, 0.0)  # at n = 1 to the bit, however tanh is rounded


def gated(own: Params, width: int) -> Params:
    """Adds a gate to each adapter of what is trained, and one of the final norm.

    Args:
      own: adapters, from ``trainable.start``.
      width: D of the model.

    Returns:
      The same tree with ``lora_gate`` beside each ``lora_a``, in its dtype, and ``ln_f``.
    """
    flat = flatten_dict(own["blocks"], sep="/")
    for path, a in list(flat.items()):
        if path.endswith("/lora_a"):
            layers, _, rank = a.shape
            first_JxR = (jnp.arange(rank) % FEATURES == jnp.arange(FEATURES)[:, None]).astype(
                a.dtype
            )
            gate = jnp.broadcast_to(first_JxR, (layers, FEATURES, rank))
            flat[path.replace("lora_a", GATE)] = jnp.array(gate)
    dtype = next(iter(flat.values())).dtype
    gain = {GAIN_GATE: jnp.zeros((FEATURES, width), dtype)}
    return {**own, "blocks": unflatten_dict(flat, sep="/"), "ln_f": gain}


def has_gates(own: Params) -> bool:
    """Returns whether what is trained is a family over n."""
    return any(path.endswith(f"/{GATE}") for path in flatten_dict(own["blocks"], sep="/"))


def groups(params: Params) -> int:
    """Of how many groups of adjacent rows the policies of a tree are; 1 for one policy."""
    flat = flatten_dict(params, sep="/") if isinstance(params["blocks"], dict) else {}
    return next((x.shape[1] for path, x in flat.items() if path.endswith(f"/{OPEN}")), 1)


def opened(own: Params, n_G: jax.Array, top: float) -> Params:
    """The adapters of rows of which each group of adjacent ones has its own n.

    Args:
      own: from ``gated``.
      n_G: float32, of each group; a batch of B rows has those of B / G rows each, in order.
      top: as of ``features``.

    Returns:
      Adapters that ``trainable.join`` takes, for batches of a multiple of G rows.
    """
    phi_GxJ = features(n_G, top)

    def of(place: str, gate: jax.Array, flat: Params) -> Params:
        del flat
        return {f"{place}{OPEN}": jnp.einsum("GJ,LJR->LGR", phi_GxJ.astype(gate.dtype), gate)}

    return _replaced(own, of, phi_GxJ)


def fixed(own: Params, n: ArrayLike, top: float) -> Params:
    """The plain adapters of the policy for one n, to be joined, merged or exported.

    Args:
      own: from ``gated``.
      n: a scalar.
      top: as of ``features``.

    Returns:
      ``lora_a`` and ``lora_b``, the gate multiplied into the latter, and the final norm's gain.
    """
    phi_J = features(n, top)

    def of(place: str, gate: jax.Array, flat: Params) -> Params:
        open_LxR = jnp.einsum("J,LJR->LR", phi_J, gate.astype(jnp.float32))
        b = flat[f"{place}lora_b"]
        return {f"{place}lora_b": (open_LxR[..., None] * b).astype(b.dtype)}

    return _replaced(own, of, phi_J)


def _replaced(
    own: Params, of: Callable[[str, jax.Array, Params], Params], phi: jax.Array
) -> Params:
    """The tree with what ``of`` makes of each gate, and ``phi`` of the gain's, in their place."""
    flat = flatten_dict(own["blocks"], sep="/")
    for path in [path for path in flat if path.endswith(f"/{GATE}")]:
        gate = flat.pop(path)
        flat |= of(path.removesuffix(GATE), gate, flat)
    gain = phi @ own["ln_f"][GAIN_GATE].astype(jnp.float32)
    return {**own, "blocks": unflatten_dict(flat, sep="/"), "ln_f": {GAIN: gain}}
