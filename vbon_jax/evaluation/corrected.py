"""Best-of-n served from a policy: its responses, kept or drawn again by their density ratio."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.bon import correction
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.data.prompts import Prompt
from vbon_jax.evaluation import measure
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling import decode
from vbon_jax.sampling.requests import Request, index
from vbon_jax.sampling.responses import Batch, Response
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training.references import response_orders


class Cost(NamedTuple):
    """What served responses took.

    Attributes:
      responses: served.
      proposals: drawn for them, in order, up to the one that was kept.
      tokens: of these proposals.
      spare: further proposals, drawn in rows that were free and not needed.
      fallbacks: responses of which no proposal was kept.
    """

    responses: int
    proposals: int
    tokens: int
    spare: int
    fallbacks: int


@dataclasses.dataclass(frozen=True)
class Corrected:
    """What responses of best-of-n are drawn by; see ``bon.correction``.

    Attributes:
      policy: near best-of-n; the proposals are its own.
      reference: at the policy's temperature.
      reward: of the best-of-n.
      table: rewards of the reference's samples, a row a prompt.
      n: of best-of-n.
      estimator: of its density.
      bound: c; more proposals a response, and nearer best-of-n.
      tries: proposals after which one is chosen among them in proportion to its weight.
      batch_size: proposals drawn at once.
    """

    policy: Sampler
    reference: Sampler
    reward: Reward
    table: References
    n: float
    estimator: str
    bound: float
    tries: int
    batch_size: int

    def responses(
        self, key: jax.Array, prompts: Sequence[Prompt], count: int
    ) -> tuple[list[list[Response]], Cost]:
        """Draws ``count`` responses to each prompt.

        A response is a function of (key, prompt id, its index) alone: its proposals are taken in
        order, whatever is drawn beside them.

        Args:
          key: of the proposals, and of what keeps them.
          prompts: in the order of the table's rows; one that is given twice has the same responses.
          count: responses a prompt.

        Returns:
          (the responses to each prompt, what they took). ``Response.extra`` has "log_weight",
          log(pi_bon / policy) in nats, and "proposals", how many it took.
        """
        by_id, _ = index(prompts)
        wanted = [(prompt_id, i) for prompt_id in by_id for i in range(count)]
        rows = min(self.batch_size, len(wanted))
        tried: dict[tuple[int, int], list[Response]] = {each: [] for each in wanted}
        served: dict[tuple[int, int], Response] = {}
        spare = fallbacks = 0
        while len(served) < len(wanted):
            open_ = [each for each in wanted if each not in served]
            requests = self._next(open_, tried, rows, by_id)
            for request, response in zip(requests, self._draw(key, requests, prompts, rows)):
                each = (request.prompt_id, request.sample // self.tries)
                if each in served:
                    spare += 1
                    continue
                tried[each].append(response)
                took = {"proposals": float(len(tried[each]))}
                if response.extra["kept"]:
                    served[each] = _with(response, took)
                elif len(tried[each]) == self.tries:
                    weights = [r.extra["log_weight"] for r in tried[each]]
                    chosen = correction.resampled(weights, response.extra["uniform"])
                    served[each] = _with(tried[each][chosen], took)
                    fallbacks += 1
        proposals = [r for each in wanted for r in tried[each]]
        cost = Cost(
            len(wanted), len(proposals), sum(len(r.tokens) for r in proposals), spare, fallbacks
        )
        return [[served[p.id, i] for i in range(count)] for p in prompts], cost

    def _next(
        self,
        open_: Sequence[tuple[int, int]],
        tried: dict[tuple[int, int], list[Response]],
        rows: int,
        by_id: dict[int, Prompt],
    ) -> list[Request]:
        """The next proposals of those still open; of each more than one where rows are free."""
        here = open_[:rows]
        requests = []
        for k, (prompt_id, i) in enumerate(here):
            done = len(tried[prompt_id, i])
            more = rows // len(here) + (k < rows % len(here))
            for t in range(done, min(done + more, self.tries)):
                request = Request(prompt_id, i * self.tries + t, by_id[prompt_id].tokens)
                requests.append(request)
        return requests

    def _draw(
        self,
        key: jax.Array,
        requests: Sequence[Request],
        prompts: Sequence[Prompt],
        rows: int,
    ) -> list[Response]:
        """Proposals with their "log_weight", the "uniform" that decides, and whether "kept"."""
        policy, reference = self.policy, self.reference
        filled = [*requests, *[requests[-1]] * (rows - len(requests))]  # one shape for all

        def also(batch: Batch) -> dict[str, jax.Array]:
            return measure.sequence_kls(policy.model, reference.model, batch)

        found = [
            r
            for group in policy.responses(key, prompts, filled, len(filled), self.reward, also)
            for r in group
        ][: len(requests)]
        _, row_of = index(prompts)
        order = None
        if self.table.order_PxM is not None:
            order = response_orders([r.tokens for r in found], policy.settings.max_new_tokens)
        density = bon_references.density(
            self.table,
            np.array([row_of[r.prompt_id] for r in requests], np.int32),
            np.array([r.reward for r in found], np.float32),
            order,
            np.array([r.extra["log_ref"] for r in found], np.float32),
            self.n,
            estimator=self.estimator,
        )
        log_ratio_B = np.array([r.extra["kl_k1"] for r in found], np.float64)
        log_weight_B = np.asarray(density.log_ratio_B, np.float64) - log_ratio_B
        ids = np.array([r.prompt_id for r in requests], np.int32)
        samples = np.array([r.sample for r in requests], np.int32)
        keys = decode.identity_keys(key, 0, ids, samples)
        after = jnp.full(len(found), policy.settings.max_new_tokens)  # its tokens have those before
        uniform_B = np.asarray(decode.uniforms(keys, after), np.float64)
        kept_B = correction.accepts(log_weight_B, self.bound, uniform_B)
        return [
            _with(r, {"log_weight": float(w), "uniform": float(u), "kept": float(k)})
            for r, w, u, k in zip(found, log_weight_B, uniform_B, kept_B, strict=True)
        ]


def _with(response: Response, extra: dict[str, float]) -> Response:
    return dataclasses.replace(response, extra=response.extra | extra)
