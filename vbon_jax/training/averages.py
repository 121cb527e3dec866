"""An exponential average of the policy's weights, kept beside them while they are trained.

The noise of policy gradients keeps the weights walking around where they should be, which costs KL
to the reference that buys no reward; their average walks less (Polyak and Juditsky, 1992).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from vbon_jax.rl import bond
from vbon_jax.training.state import TrainState

NAME = "average"  # its place in the state's params; the optimizer does not see it


def averaged(update: Callable[..., Any], half_life: float) -> Callable[..., Any]:
    """An update that also moves the average of ``params["decoder"]``.

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
        own = {name: tree for name, tree in state.params.items() if name != NAME}
        new, metrics = update(state._replace(params=own), *rest)
        average = bond.ema(state.params[NAME], new.params["decoder"], rate)
        return new._replace(params=new.params | {NAME: average}), metrics

    return with_average


def policy(params: dict[str, Any]) -> Any:
    """The policy of a training state: the average of its weights, or the last ones without it."""
    return params.get(NAME, params["decoder"])
