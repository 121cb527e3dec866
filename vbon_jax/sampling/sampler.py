"""The one way to draw responses and score them: a model with its mesh and sampling settings."""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from vbon_jax import sharding
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import tokenizer as tokenizers
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples, response_ids
from vbon_jax.data.sources import chat
from vbon_jax.models import family, lm, trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.progress import log
from vbon_jax.rewards.base import Reward, checked
from vbon_jax.sampling import decode, pages, slots
from vbon_jax.sampling.idle import Idle
from vbon_jax.sampling.requests import (
    Prompts,
    Request,
    adjacent,
    bucket_length,
    index,
    pad_left,
    requests_for,
)
from vbon_jax.sampling.responses import Batch, Measure, Response, Sampling


def named_key(seed: int, name: str) -> jax.Array:
    """The random key of a piece of work: a function of the seed and the work's name alone."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def respond(
    params: Any,
    prompts: Prompts,
    keys_B: jax.Array,
    config: DecoderConfig,
    sampling: Sampling,
    together: str | None = None,
) -> decode.Rollout:
    """Draws one response a key; the only caller of the jitted rollout.

    Args:
      params: decoder parameters.
      prompts: padded prompts [N, P] on the device, each of B / N rows.
      keys_B: one key a row, see ``decode.identity_keys``.
      config: the decoder's configuration.
      sampling: how to draw.
      together: see ``decode.rollout``.

    Returns:
      Rollout with ``sampling.max_new_tokens`` slots a row.
    """
    return decode.rollout(
        params, *prompts, keys_B, np.float32(sampling.temperature), config=config,
        limits=sampling.limits, together=together,
    )  # fmt: skip


def _first(rollout: decode.Rollout, count: int) -> decode.Rollout:
    return jax.tree.map(lambda x: x[:count], rollout)


def _agreed(a: str, b: str) -> str:
    """What two texts begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(x for x, _ in pairs)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A language model that responds to prompts: model, mesh and sampling settings.

    A response is a function of (key, step, prompt id, sample index) and the parameters alone: batch
    size and order do not change it.

    Attributes:
      model: configuration, parameters on ``mesh`` and tokenizer.
      mesh: the device mesh.
      settings: temperature, length limit and filters.
      idle: told of every draw of ``batches``; None where no one asks.
    """

    model: LanguageModel
    mesh: Mesh
    settings: Sampling
    idle: Idle | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The model's tokenizer."""
        return self.model.tokenizer

    def at(self, **settings: Any) -> Self:
        """The same model under other sampling settings: ``at(temperature=0.7)``."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))

    def with_params(self, params: Any) -> Self:
        """The same sampler with other decoder parameters."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, params=params))

    # --- Drawing ------------------------------------------------------------------------------

    def draw(
        self,
        key: jax.Array,
        step: int,
        requests: Sequence[Request],
        length: int | None = None,
        rows: int = 0,
    ) -> Batch:
        """Draws one batch of responses and leaves it on the device.

        Args:
          key: with (step, prompt id, sample) it fixes a response.
          step: training step, or 0 where there is none.
          requests: the rows; their number and ``length`` decide the compiled shape.
          length: padded prompt length in tokens; None takes the bucket of the longest.
          rows: that they take in turns (see ``slots``); 0, or as many as requests, for a row each.
        """
        if length is None:
            length = bucket_length(max(len(r.tokens) for r in requests))
        prompts = pad_left([r.tokens for r in requests], length, self.settings.pad_id)
        if 0 < rows < len(requests):
            setup = self._slots(requests, rows, length)
            parts = [
                _first(rollout, len(page))
                for page, rollout in pages.drawn(
                    self.model.params, key, requests, self.mesh, self.settings.temperature, setup,
                    step=step,
                )
            ]  # fmt: skip
            whole = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
            prompts, whole = sharding.place((prompts, whole), self.mesh, "batch")
            return Batch(requests, prompts, whole, self.settings.temperature)
        each = adjacent(requests, sharding.ways(self.mesh))
        # Of a family over n, rows of one prompt may be of several policies.
        each = math.gcd(each, len(requests) // family.groups(self.model.params))
        own = Prompts(*(x[::each] for x in prompts))
        ids = np.array([r.prompt_id for r in requests], np.int32)
        samples = np.array([r.sample for r in requests], np.int32)
        prompts, own, ids, samples = sharding.place(
            (prompts, own, ids, samples), self.mesh, "batch"
        )
        keys = decode.identity_keys(key, step, ids, samples)
        rollout = respond(self.model.params, own, keys, self.model.config, self.settings)
        return Batch(requests, prompts, rollout, self.settings.temperature)

    def batches(
        self, key: jax.Array, requests: Sequence[Request], batch_size: int, skip: int = 0
    ) -> Iterator[Batch]:
        """Draws responses to requests in order, in ``batch_size`` rows (see ``slots``).

        Batches have one shape, the last one too, and prompts share one padded length.

        Args:
          key: with (prompt id, sample) it fixes a response.
          requests: all there are to draw: they decide the compiled shape.
          batch_size: rows drawn at once.
          skip: how many of the requests, the first, were drawn before.

        Yields:
          Batch of ``batch_size`` rows, or as many less as devices do not divide, with arrays still
          on the devices; only its first ``batch.size`` rows are real.
        """
        for page in self._pages(key, requests, batch_size, skip):
            yield from page

    def _pages(
        self, key: jax.Array, requests: Sequence[Request], batch_size: int, skip: int
    ) -> Iterator[list[Batch]]:
        """``batches``, a page at a time. A page is handed out when the next one is dispatched.

        So the host's work on one overlaps the device's on the other.
        """
        if skip >= len(requests):
            return
        setup = self._slots(requests, batch_size)
        ahead: list[Batch] = []
        for rows, rollout in pages.drawn(
            self.model.params, key, requests[skip:], self.mesh, self.settings.temperature, setup
        ):
            if self.idle is not None:
                self.idle.dispatched(rollout)
            if ahead:
                yield ahead
            ahead = self._batches_of(rows, rollout, setup.shape)
        yield ahead

    def _slots(
        self, requests: Sequence[Request], batch_size: int, length: int | None = None
    ) -> slots.Setup:
        """What requests are drawn in."""
        length = length or bucket_length(max(len(r.tokens) for r in requests))
        each = adjacent(requests)
        T = self.settings.max_new_tokens
        devices = sharding.ways(self.mesh)
        shape = pages.shape_for(batch_size, len(requests) // each, each, length, T, devices)
        return slots.Setup(self.model.config, shape, self.settings.limits)

    def _batches_of(
        self, requests: Sequence[Request], rollout: decode.Rollout, shape: slots.Shape
    ) -> list[Batch]:
        """A page as batches of as many rows as are drawn at once."""
        found = []
        with jax.set_mesh(self.mesh):
            parts = pages.batches(rollout, shape=shape)
        for first, part in zip(range(0, len(requests), shape.batch), parts, strict=False):
            rows = requests[first : first + shape.batch]
            tokens = [r.tokens for r in rows]
            filled = [*tokens, *tokens[:1] * (shape.batch - len(tokens))]
            prompts = pad_left(filled, shape.length, self.settings.pad_id)
            placed = sharding.place(prompts, self.mesh, "batch")
            found.append(Batch(rows, placed, part, self.settings.temperature))
        return found

    def streamed(
        self, key: jax.Array, requests: Sequence[Request], batch_size: int, every: int = 2
    ) -> Iterator[tuple[Request, str, bool]]:
        """Draws responses as ``batches`` does, and tells their texts as they are written.

        One is told after another, while those after it are drawn beside it. A piece of text is
        told when two looks agree on it: a token may be part of a character.

        Args:
          key: with (prompt id, sample) it fixes a response.
          requests: in order.
          batch_size: rows drawn at once.
          every: tokens of a row between two looks.

        Yields:
          (request, what its text goes on with, whether it ends there).
        """
        setup, params = self._slots(requests, batch_size), self.model.params
        of: Sequence[Request] = ()
        at, told, text = 0, "", ""
        for rows, rollout in pages.drawn(
            params, key, requests, self.mesh, self.settings.temperature, setup, every
        ):
            at, of = at if rows is of else 0, rows
            tokens, mask, finished = sharding.fetch((*rollout[:2], rollout.finished_B))
            while at < len(rows):
                ids = tokens[at][mask[at]].tolist()
                now = self.texts([rows[at].tokens], [ids])[0]
                ends = bool(finished[at]) or len(ids) == self.settings.max_new_tokens
                sure = now if ends else _agreed(text, now)
                yield rows[at], sure[len(told) :], ends
                told, text = max(told, sure, key=len), now
                if not ends:
                    break
                at, told, text = at + 1, "", ""

    # --- Stored responses -----------------------------------------------------------------------

    @functools.cached_property
    def _closing_ids(self) -> dict[bool, int | None]:
        """The id that ends a text, of plain and of chat prompts."""
        ends = self.settings.end_ids
        return {chats: chat.closing_id(self.tokenizer, ends, chats) for chats in (False, True)}

    def stored_ids(self, samples: PromptSamples, i: int, prompt: Sequence[int]) -> list[int]:
        """Token ids of a stored response to a prompt; see ``data.samples.response_ids``."""
        encode = functools.partial(tokenizers.continuation_ids, self.tokenizer, prompt)
        closing = self._closing_ids[bool(samples.messages)]
        longest = self.settings.max_new_tokens
        return response_ids(samples, i, encode, self.settings.end_ids, closing, longest)

    # --- Scoring ------------------------------------------------------------------------------

    def texts(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[str]:
        """Decodes sampled ids after those of their prompts, the end of a response left out."""
        kept = [[t for t in row if t not in self.settings.end_ids] for row in rows]
        return tokenizers.continuations(self.tokenizer, prompts, kept)

    def rewards(
        self,
        reward: Reward,
        prompts: Sequence[Prompt],
        rows: Prompts,
        rollout: decode.Rollout,
        name: str = "reward",
    ) -> np.ndarray:
        """Float32 rewards [B] of the first B = len(prompts) rows, on the host.

        Raises:
          InputError: a reward is not finite; names prompt and response, and the reward by ``name``.
        """
        found = reward(prompts, *rows, rollout.tokens_BxT, rollout.mask_BxT)
        return self._checked(found, prompts, rollout, name)

    def _checked(
        self, found: Any, prompts: Sequence[Prompt], rollout: decode.Rollout, name: str
    ) -> np.ndarray:
        """What a reward found, of the first rows, float32 on the host; see ``rewards``."""
        values = np.asarray(sharding.fetch(found), np.float32)[: len(prompts)]

        def text_of(row: int) -> str:
            tokens, mask = sharding.fetch((rollout.tokens_BxT[row], rollout.mask_BxT[row]))
            ids = tokens[mask].tolist()
            return self.texts([prompts[row].tokens], [ids])[0]

        return checked(values, f"the {name} gave", [p.text for p in prompts], text_of)

    def responses(
        self,
        key: jax.Array,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        batch_size: int,
        reward: Reward,
        also: Measure | None = None,
        skip: int = 0,
    ) -> Iterator[list[Response]]:
        """Draws and scores requests, in order, a batch at a time.

        Args:
          key: of the draws.
          prompts: those that the requests name.
          requests: the responses wanted.
          batch_size: rows drawn at once.
          reward: scores them.
          also: measures more on a batch; ends up in ``Response.extra``.
          skip: how many requests, the first, were drawn before; a response is the same, to the last
            bit of its log-prob, as if they were drawn again.

        Raises:
          InputError: a reward is not finite.
        """
        by_id, _ = index(prompts)
        scored: list[tuple[Batch, Any, dict[str, Any]]] = []
        for page in self._pages(key, requests, batch_size, skip):
            yield from (self._finished(by_id, *each) for each in scored)
            scored = []
            for batch in page:
                of = [by_id[r.prompt_id] for r in batch.requests]
                found = reward(of, *batch.prompts, batch.rollout.tokens_BxT, batch.rollout.mask_BxT)
                extra = also(batch) if also else {}
                # The device has scores only after the page it draws now: the host would wait for
                # it, and it then for the host. So it is given the next page first. What the host
                # computed is handed on at once, not to be lost.
                if all(isinstance(x, jax.Array) for x in (found, *extra.values())):
                    scored.append((batch, found, extra))
                else:
                    yield self._finished(by_id, batch, found, extra)
        yield from (self._finished(by_id, *each) for each in scored)

    def _finished(
        self, by_id: dict[int, Prompt], batch: Batch, found: Any, extra: dict[str, Any]
    ) -> list[Response]:
        """The responses of a batch, with the scores that were found."""
        of = [by_id[r.prompt_id] for r in batch.requests]
        rewards = self._checked(found, of, batch.rollout, "reward")
        rollout, extra = sharding.fetch((batch.rollout, extra))
        rows = [
            row[keep].tolist()
            for row, keep in zip(rollout.tokens_BxT[: batch.size], rollout.mask_BxT)
        ]
        texts = self.texts([r.tokens for r in batch.requests], rows)
        log_probs = rollout.log_probs_BxT.sum(axis=1, dtype=np.float64)
        return [
            Response(
                request,
                tuple(rows[i]),
                texts[i],
                float(np.float32(log_probs[i])),
                bool(rollout.finished_B[i]),
                float(rewards[i]),
                {name: float(values[i]) for name, values in extra.items()},
            )
            for i, request in enumerate(batch.requests)
        ]

    def measure(self, reward: Reward, prompts: Sequence[Prompt], name: str) -> Measure:
        """A `Measure` that gives the scores of another reward, as ``name``."""
        by_id, _ = index(prompts)

        def also(batch: Batch) -> dict[str, Any]:
            of = [by_id[r.prompt_id] for r in batch.requests]
            return {name: self.rewards(reward, of, batch.prompts, batch.rollout, name)}

        return also

    # --- For the user -------------------------------------------------------------------------

    def generate(
        self, texts: Sequence[Any], count: int = 1, seed: int = 0, batch_size: int = 64
    ) -> list[list[str]]:
        """Generates ``count`` responses to each prompt.

        Args:
          texts: prompts: texts, or conversations, each a list of {"role", "content"}, which the
            tokenizer's chat template renders.
          count: responses a prompt.
          seed: another seed, other responses.
          batch_size: responses drawn at once.

        Returns:
          One list of ``count`` texts a prompt, prompts and EOS left out.

        Raises:
          InputError: a prompt without a token, or longer than the model's context.
        """
        prompts = chat.given(texts, self.tokenizer)
        self.check_lengths(prompts)
        requests = requests_for(prompts, count)
        found: list[str] = []
        key = named_key(seed, "generate")
        for batch in self.batches(key, requests, min(batch_size, max(len(requests), 1))):
            tokens, mask = sharding.fetch((batch.rollout.tokens_BxT, batch.rollout.mask_BxT))
            rows = [t[m].tolist() for t, m in zip(tokens, mask)][: batch.size]
            found += self.texts([r.tokens for r in batch.requests], rows)
        return [found[i : i + count] for i in range(0, len(found), count)]

    def stream(self, text: Any, seed: int = 0) -> Iterator[str]:
        """Generates a response to one prompt, and gives its text as it is written.

        Args:
          text: the prompt: a text, or a conversation, as in ``generate``.
          seed: another seed, another response.

        Yields:
          Pieces that join up to what ``generate([text], seed=seed)[0][0]`` returns.

        Raises:
          InputError: as ``generate`` does.
        """
        prompts = chat.given([text], self.tokenizer)
        self.check_lengths(prompts)
        key = named_key(seed, "generate")
        for _, piece, _ in self.streamed(key, requests_for(prompts, 1), 1):
            if piece:
                yield piece

    def check_lengths(self, prompts: Sequence[Prompt]) -> None:
        """Raises InputError where a prompt and its response do not fit the model's context."""
        prompt_files.fits_context(
            prompts, self.settings.max_new_tokens, self.model.config.positions
        )

    def merged(self) -> Self:
        """The same model without adapters, which are added to its weights.

        Where the sums are float32 the arithmetic is too: that of bfloat16 would round most of a
        small update away. Where all is bfloat16, what rounding loses is logged.
        """
        model = self.model
        alpha = model.config.lora_alpha
        params = trainable.merged(model.params, alpha)
        config = dataclasses.replace(model.config, lora_alpha=DecoderConfig.lora_alpha)
        if trainable.has_adapters(model.params):
            if lost := trainable.merge_loss(model.params, alpha):
                log(
                    f"merging the adapters in bfloat16 rounds away {lost:.1%} of their update "
                    "(relative Frobenius norm): memory.param_dtype=float32 keeps it"
                )
            else:
                config = dataclasses.replace(config, compute_dtype="float32")
        return dataclasses.replace(
            self, model=dataclasses.replace(model, config=config, params=params)
        )

    def save(self, path: str | Path) -> None:
        """Writes the model as a Hugging Face directory, with its sampling settings as defaults."""
        lm.save(
            self.model,
            Path(path),
            temperature=self.settings.temperature,
            end_ids=self.settings.end_ids,
            params=self.merged().model.params,
        )
