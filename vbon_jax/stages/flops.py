"""The arithmetic of a run by formula: floating-point operations of its matrix products.

A product of [a, b] with [b, c] counts 2abc, so a token costs 2 operations for each weight that it
meets, and as much again for each of the two gradients, of inputs and of weights. Attention adds two
products of heads x head width for each pair of a query's and a key's slot, of the masked pairs too:
the programs compute them. Sums over elements, sampling and the optimizer are left out, of Muon its
products too, and so are value heads and adapters, which are thin.
"""

import dataclasses

from vbon_jax.methods.learning import Job
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.training.options import Memory


def per_token(config: DecoderConfig) -> int:
    """Weights of one layer that a token meets."""
    c = config
    attention = 2 * c.width * c.key_width * (c.heads + c.key_heads)
    return attention + (3 if c.gated else 2) * c.width * c.mlp_width


def attention(config: DecoderConfig, queries: int, keys: int) -> int:
    """Of one layer's attention in a forward pass: each of ``queries`` reads ``keys`` slots."""
    return 2 * 2 * queries * keys * config.heads * config.key_width


def logits(config: DecoderConfig, tokens: int) -> int:
    """Of the logits of ``tokens``."""
    return 2 * tokens * config.vocab_size * config.width


def draw(config: DecoderConfig, prompts: int, each: int, prompt: int, new: int) -> dict[str, int]:
    """Of responses: each prompt is run once, then the tokens of its responses.

    Args:
      config: the model.
      prompts: how many.
      each: responses to each of them.
      prompt: padded length of a prompt, in tokens.
      new: tokens of a response, all of them drawn.

    Returns:
      Those of "prompts" and of "responses".
    """
    read, drawn = prompts * prompt, prompts * each * new
    layers, weights = config.layers, per_token(config)
    return {
        "prompts": layers * (2 * read * weights + attention(config, read, prompt))
        if prompt > 1
        else 0,
        "responses": layers * (2 * drawn * weights + attention(config, drawn, prompt + new))
        + logits(config, drawn),
    }


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of prompt and response as an update runs them, ``together`` of them after one prompt."""

    count: int
    prompt: int
    new: int
    together: int

    def forward(self, config: DecoderConfig, layers: int) -> tuple[int, int]:
        """Of a pass through some layers: products with weights, and attention."""
        shared = self.count // self.together * self.prompt
        own, columns = self.count * self.new, self.prompt + self.new
        if self.together == 1:
            pairs = attention(config, shared + own, columns)
        else:
            pairs = attention(config, shared, self.prompt) + attention(config, own, columns)
        return layers * 2 * (shared + own) * per_token(config), layers * pairs

    def gradient(
        self, config: DecoderConfig, layers: int, memory: Memory, weights_too: bool = True
    ) -> int:
        """Of a pass and its gradients; what remat computes again is at most a pass."""
        products, pairs = self.forward(config, layers)
        again = {"none": 0, "dots": pairs, "full": products + pairs}[memory.remat]
        return (3 if weights_too else 2) * products + 3 * pairs + again


def update(job: Job, prompt: int, new: int) -> dict[str, int]:
    """Of an iteration's update, of the methods that maximise a sequence reward: vbon and ppo.

    Args:
      job: the method and how it is trained.
      prompt: padded length of a prompt, in tokens.
      new: of a response; all are as long.

    Returns:
      Those of "score", one pass under policy and reference each, and of "gradient steps", all
      epochs: forward, backward and what ``memory.remat`` computes again.
    """
    train, memory, trained = job.training.train, job.training.memory, job.training.trained
    config, setup = job.config, job.setup()
    rows = _Rows(train.rows, prompt, new, setup.together if 2 * prompt >= new else 1)
    drawn = logits(config, rows.count * new)
    frozen = 0 if trained.rank or trained.layers == -1 else config.layers - trained.layers
    own = config.layers - frozen

    trunk = 0 if job.trunk_layers else frozen  # a rollout has told what the trunk makes of it
    score = sum(rows.forward(config, trunk)) + 2 * sum(rows.forward(config, own)) + 2 * drawn
    # Logits and their gradients are computed at once, and kept for no backward pass.
    heads = (3 if trained.whole else 2) + (train.penalty == "full")
    step = rows.gradient(config, own, memory, weights_too=not trained.rank) + heads * drawn
    if job.value is not None:
        value = job.value.config
        score += sum(rows.forward(value, value.layers))
        step += rows.gradient(value, value.layers, memory)
    return {"score": score, "gradient steps": train.ppo_epochs * step}
