"""The update and the rollout of a small GPT-2 as programs of a mesh: shapes alone, no array."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon import references
from vbon_jax.methods import vbon
from vbon_jax.models import decoder, heads
from vbon_jax.sampling import decode, pages, slots
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import scoring, state
from vbon_jax.training.options import Memory, Train

CONFIG = decoder.DecoderConfig(
    vocab_size=2_048, positions=128, layers=2, width=64, heads=8, mlp_width=256, remat="full"
)
ROWS, PROMPT, NEW = 64, 120, 8
S = jax.ShapeDtypeStruct


def placed(tree, mesh, prefix=""):
    """Shapes where the table puts them."""
    where = sharding.shardings(tree, mesh, prefix)
    return jax.tree.map(lambda x, to: S(x.shape, x.dtype, sharding=to), tree, where)


def update_of(mesh, config=CONFIG, **memory):
    """One gradient step of vBoN, a jitted function, and the shapes that it is called with."""
    optimizer = state.adamw(lambda step: 1e-5, 1e-5, 0.0, 1.0)
    train = Train(batch_size=ROWS, minibatch_size=ROWS, ppo_epochs=1)
    setup = scoring.Setup(config, optimizer, train, Memory(chunk=ROWS * NEW // 4, **memory))
    key = jax.random.key(0)
    base = jax.eval_shape(lambda: decoder.init(config, key))
    own = {
        "decoder": base,
        "value": {"head": jax.eval_shape(lambda: heads.init_value(config, key))},
    }
    first = placed(jax.eval_shape(lambda own: state.create(own, optimizer, key), own), mesh)
    flat, real = S((ROWS, NEW), jnp.int32), S((ROWS, NEW), bool)
    each = S((ROWS,), jnp.float32)
    rollout = decode.Rollout(flat, real, S((ROWS, NEW), jnp.float32), S((ROWS,), bool))
    rows = (S((ROWS, PROMPT), jnp.int32), S((ROWS, PROMPT), bool), rollout, each)
    batch = ScoredRollout(*placed((*rows, S((ROWS,), jnp.int32)), mesh, "batch"), 1.0)
    rewards = np.zeros((ROWS, 4), np.float32)
    table = jax.eval_shape(lambda: references.references(rewards, "interval"))
    scalar = S((), jnp.float32)
    step = jax.jit(partial(vbon.update, setup=setup), donate_argnums=0)
    reference = placed({"decoder": base}, mesh)
    return step, (first, reference, (batch,), placed(table, mesh), scalar, scalar)


def rollout_of(mesh, config=CONFIG):
    """A rollout, a jitted function, and the shapes that it is called with."""
    base = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
    rows = (S((ROWS, PROMPT), jnp.int32), S((ROWS, PROMPT), bool), keys)
    limits = decode.Limits(NEW, (0,), 0)
    step = jax.jit(partial(decode.rollout, temperature=1.0, config=config, limits=limits))
    return step, (placed({"decoder": base}, mesh)["decoder"], *placed(rows, mesh, "batch"))


def slots_of(mesh, config=CONFIG):
    """A page of responses in slots, a jitted function, and the shapes that it is called with."""
    shape = pages.shape_for(ROWS, 2 * ROWS, 4, PROMPT, NEW, sharding.ways(mesh))
    setup = slots.Setup(config, shape, decode.Limits(NEW, (0,), 0))
    state = placed(jax.eval_shape(partial(slots.empty, setup)), mesh, "slots")
    base = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    params = placed({"decoder": base}, mesh)["decoder"]
    step = jax.jit(partial(slots.draw, setup=setup), donate_argnums=0)
    return step, (state, params, S((), jnp.float32), S((), jnp.int32), S((), jnp.int32))


def lowered(of, mesh):
    """What ``of`` gives, lowered for the mesh."""
    step, args = of(mesh)
    with jax.set_mesh(mesh):
        return step.lower(*args)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Sizes that collectives are held against, of float32 arrays."""

    config: decoder.DecoderConfig = CONFIG

    @property
    def layer(self):
        """The weights of one layer."""
        base = jax.eval_shape(lambda: decoder.init(self.config, jax.random.key(0)))
        return sum(4 * x.size for x in jax.tree.leaves(base["blocks"])) // self.config.layers

    @property
    def matrices(self):
        """Those of a layer's weights that fsdp divides."""
        width, wide = self.config.width, self.config.mlp_width
        return 4 * (4 * width * width + 2 * width * wide)

    @property
    def embedding(self):
        return 4 * self.config.vocab_size * self.config.width

    @property
    def residual(self):
        """Hidden states of all tokens of a minibatch."""
        return 4 * ROWS * (PROMPT + NEW) * self.config.width

    @property
    def step(self):
        """Hidden states of one decoded token of each row."""
        return 4 * ROWS * self.config.width

    @property
    def logits(self):
        return 4 * ROWS * self.config.vocab_size
