"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib


class TrainState(NamedTuple):
    """What a training run carries from step to step, a pytree.

    Attributes:
      step: int32 scalar, updates done (of PPO: iterations).
      params: what is trained, by name.
      opt_state: of the optimizer.
      key: the run's random key; every number of step s follows from it and s.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


DECAYED = ("kernel", "wte", "wpe", "head", "lora_a", "lora_b")


def create(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state at step 0."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), key)


def adamw(
    schedule: optax.Schedule,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm; biases and norms are not decayed.

    Both moments are stored in ``dtype`` and updated in float32.
    """
    return _chained(
        _stored_as(dtype, optax.scale_by_adam(eps=eps)), schedule, weight_decay, max_grad_norm
    )


def muon(
    schedule: optax.Schedule,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    dtype: str = "float32",
) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) on the matrices of the blocks, Adam on all else; else as `adamw`.

    The momentum of a matrix is orthogonalised, and scaled to the root mean square that Adam's steps
    have (Liu et al., "Muon is Scalable for LLM Training", 2025), so that one learning rate, and one
    that suits AdamW, serves all parameters.
    """
    whole = optax.contrib.muon(
        1.0, eps=eps, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices
    )
    inner = optax.chain(whole, optax.scale(-1.0))  # its own learning rate is of the other sign
    return _chained(_stored_as(dtype, inner), schedule, weight_decay, max_grad_norm)


def _matrices(params: Any) -> Any:
    """Of each kernel and adapter of the blocks, the axes that it sums over and those it gives."""

    def of(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(key, "key", "")) for key in path]
        if "blocks" not in names or names[-1] not in ("kernel", "lora_a", "lora_b"):
            return None
        if names[-1] != "kernel" or "attention" not in names:  # [layers, in, out]
            return optax.contrib.MuonDimensionNumbers((1,), (2,))
        if "out" in names:  # [layers, heads, head width, out]
            return optax.contrib.MuonDimensionNumbers((1, 2), (3,))
        return optax.contrib.MuonDimensionNumbers((1,), (2, 3))

    return jax.tree_util.tree_map_with_path(of, params)


def _chained(
    inner: optax.GradientTransformation,
    schedule: optax.Schedule,
    weight_decay: float,
    max_grad_norm: float,
) -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: str(getattr(path[-1], "key", "")) in DECAYED, params
        )

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        inner,
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )


def at_step(opt_state: Any, count: jax.Array) -> Any:
    """The optimizer's state with its learning rate where ``count`` gradient steps put it."""
    return optax.tree.set(
        opt_state, lambda path, _: "ScaleByScheduleState" in str(path), count=count
    )


def _stored_as(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` on float32, its moments kept in ``dtype`` between the steps."""

    def cast(tree: Any, to: Any) -> Any:
        def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            constant = "ns_coeffs" in str(path)  # of Muon
            return x if constant or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(to)

        return jax.tree_util.tree_map_with_path(one, tree)

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
