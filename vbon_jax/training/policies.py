"""Which weights of a training state are its policy: the last, their average, or the best so far.

They stand in the state's params beside ``decoder``, the weights being trained, and the optimizer
does not see them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax import sharding
from vbon_jax.rl import bond
from vbon_jax.training.state import TrainState

AVERAGE = "average"  # an exponential average of the weights
BEST = "best"  # {"decoder", "kl", "looks"}: see `judged`


def policy(params: dict[str, Any]) -> Any:
    """The weights that training gives: the best or the average if there is one, else the last."""
    if BEST in params:
        return params[BEST]["decoder"]
    return params.get(AVERAGE, params["decoder"])


def averaged(update: Callable[..., Any], half_life: float) -> Callable[..., Any]:
    """An update that also moves the average of ``params["decoder"]``.

    The noise of policy gradients keeps the weights walking around where they should be, which costs
    KL to the reference that buys no reward; their average walks less (Polyak and Juditsky, 1992):

        average <- average + (1 - 2^(-1 / half_life)) (decoder - average)

    Args:
      update: (state, ...) -> (state, metrics), of a state without the average.
      half_life: iterations after which a weight counts half.

    Returns:
      The same for a state whose params have the average; jitted, the state is donated.
    """
    rate = 1.0 - 2.0 ** (-1.0 / half_life)

    @partial(jax.jit, donate_argnums=0)
    def with_average(state: TrainState, *rest: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        own = {name: tree for name, tree in state.params.items() if name != AVERAGE}
        new, metrics = update(state._replace(params=own), *rest)
        average = bond.ema(state.params[AVERAGE], new.params["decoder"], rate)
        state = new._replace(params=new.params | {AVERAGE: average})
        return sharding.constrain(state, ""), metrics

    return with_average


def unjudged(own: Any) -> dict[str, Any]:
    """The best so far before the first look: the first weights, at an infinite KL."""
    copy = jax.tree.map(jnp.copy, own)
    return {"decoder": copy, "kl": jnp.float32(jnp.inf), "looks": jnp.int32(0)}


def judged(state: TrainState, kl: jax.Array, patience: int) -> TrainState:
    """Takes a look at the weights: they are the best so far where their ``kl`` is the least.

    Args:
      state: its params hold "best": the best weights, their KL, and the looks since then.
      kl: float32 scalar, what the weights are judged by, on prompts that they were not trained on.
      patience: looks without a better one after which the best stays: of a population, members
        that would have ended alone go on with the others.

    Returns:
      The state with "best" brought up to date.
    """
    best = state.params[BEST]
    better = (kl < best["kl"]) & (best["looks"] < patience)
    found = {
        "decoder": jax.tree.map(
            lambda old, new: jnp.where(better, new, old), best["decoder"], state.params["decoder"]
        ),
        "kl": jnp.where(better, kl, best["kl"]),
        "looks": jnp.where(better, 0, best["looks"] + 1),
    }
    return sharding.constrain(state._replace(params=state.params | {BEST: found}), "")
