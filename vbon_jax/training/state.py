"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """step: int32 scalar, updates done (of PPO: iterations). params, opt_state: pytrees.
    key: the run's random key; every number of step s follows from it and s."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def create(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A fresh state at step 0."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), key)


def adamw(
    schedule: optax.Schedule, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm; biases and norms are not decayed."""

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: str(getattr(path[-1], "key", "")) in ("kernel", "wte", "wpe"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, eps=eps, weight_decay=weight_decay, mask=decayed),
    )
