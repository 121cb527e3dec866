"""A tiny task to train on: random decoder, random rewards, a handful of prompts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.methods import vbon
from vbon_jax.models import heads
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling.requests import Request
from vbon_jax.sampling.responses import Sampling, ScoredRollout
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training import ppo, scoring, state
from vbon_jax.training.options import Memory, Train

T = 6
N = 4.0
BATCH = 16
TEMPERATURE = 0.9


class Numbers:
    """A tokenizer whose texts are the ids themselves."""

    eos_token_id, chat_template = 3, None

    def decode(self, row, skip_special_tokens):
        assert skip_special_tokens is False
        return "".join(f"{int(x)} " for x in row)

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row, skip_special_tokens) for row in rows]


def sampler(config, params, mesh, **settings):
    """A model on ``mesh`` with sampling settings, and ``Numbers`` for texts."""
    return Sampler(LanguageModel(config, params, Numbers()), mesh, Sampling(**settings))


def token_reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
    """A reward that a policy can raise: the share of small ids, made injective by the sum."""
    tokens, mask = sharding.fetch((response_BxT, response_mask_BxT))
    small = np.sum((tokens < 18) & mask, axis=1)
    return (small + 1e-4 * np.sum(tokens * mask, axis=1)).astype(np.float32)


def changed(setup, **changes):
    """A setup with other values: of its own fields, of ``train``'s or of ``memory``'s."""
    parts = {}
    for part in ("train", "memory"):
        group = getattr(setup, part)
        own = {f.name for f in dataclasses.fields(group)} & changes.keys()
        parts[part] = dataclasses.replace(group, **{k: changes.pop(k) for k in own})
    return dataclasses.replace(setup, **parts, **changes)


experience = jax.jit(vbon.experience, static_argnames="setup")
loss = jax.jit(ppo.loss, static_argnames="setup")
gradients = jax.jit(ppo.gradients, static_argnames="setup")


class World:
    """Everything an iteration of PPO needs, on the mesh given."""

    reward = staticmethod(token_reward)
    batch_size, n = BATCH, N

    def __init__(self, config, params):
        rng = np.random.default_rng(2)
        self.config = config
        self.prompts = [
            Prompt(10 + i, f"p{i}", tuple(int(t) for t in rng.integers(4, 37, size=1 + i % 4)))
            for i in range(8)
        ]
        self.table = np.sort(rng.normal(2, 1, size=(8, 32)).astype(np.float32), axis=1)
        self.references = bon_references.references(self.table, "harmonic")
        self.optimizer = state.adamw(optax.linear_schedule(5e-3, 0.0, 100), 1e-5, 0.01, 1.0)
        self.setup = scoring.Setup(
            config, self.optimizer, Train(ppo_epochs=2, minibatch_size=8, penalty="sampled"),
            Memory(), estimator="harmonic",
        )  # fmt: skip
        self._host = jax.device_get(params)
        self._value = rng.normal(size=(config.width, 1)).astype(np.float32) * 0.1

    def reference(self, mesh):
        return sharding.place({"decoder": self._host}, mesh)

    def fresh(self, mesh):
        """A state of copies: an update donates it."""
        head = heads.init_value(self.config, jax.random.key(1))
        tree = {
            "decoder": jax.tree.map(np.array, self._host),
            "value": {"head": {**head, "kernel": self._value.copy()}},
        }
        return sharding.place(
            state.create(sharding.place(tree, mesh), self.optimizer, jax.random.key(7)), mesh
        )

    def draw(self, mesh, params, step=0, temperature=TEMPERATURE):
        """Responses of a policy, two to each prompt beside each other."""
        model = sampler(
            self.config, params, mesh, temperature=temperature, max_new_tokens=T, end_ids=(3,),
            pad_id=0,
        )  # fmt: skip
        requests = [Request(p.id, s, p.tokens) for p in self.prompts for s in range(BATCH // 8)]
        return model.draw(jax.random.key(9), step, requests)

    def rollout_batch(self, mesh, train_state, step=0, temperature=TEMPERATURE):
        """A scored rollout of the state's policy."""
        batch = self.draw(mesh, train_state.params["decoder"], step, temperature)
        rewards = token_reward(None, *batch.prompts, *batch.rollout[:2])
        placed = sharding.place((rewards, np.arange(BATCH, dtype=np.int32) // 2), mesh, "batch")
        return ScoredRollout(*batch.prompts, batch.rollout, *placed, batch.temperature)

    def arguments(self, mesh, train_state, batch, n=N):
        return (
            train_state, self.reference(mesh), (batch,), self.references, jnp.float32(n),
            jnp.float32(0.1),
        )  # fmt: skip

    def update(self, mesh, train_state, batch, n=N, **changes):
        """One update of Algorithm 1; the state is donated."""
        return vbon.update(
            *self.arguments(mesh, train_state, batch, n), setup=changed(self.setup, **changes)
        )

    def lower(self, mesh, train_state, batch):
        """The update's program, not yet compiled."""
        return vbon.update.lower(*self.arguments(mesh, train_state, batch), setup=self.setup)

    def experience(self, mesh, batch, params=None, references=None, **changes):
        return experience(
            self.fresh(mesh).params if params is None else params,
            self.reference(mesh), batch, self.references if references is None else references,
            jnp.float32(self.n), jnp.float32(0.1), setup=changed(self.setup, **changes),
        )  # fmt: skip
