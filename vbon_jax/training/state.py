"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


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

    def decayed(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: str(getattr(path[-1], "key", "")) in DECAYED, params
        )

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        _stored_as(dtype, optax.scale_by_adam(eps=eps)),
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
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def init(params: Any) -> Any:
        return cast(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(cast(updates, jnp.float32), cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
