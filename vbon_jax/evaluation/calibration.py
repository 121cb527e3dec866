"""Whether a head that predicts distributions of the reward may be believed.

The probability integral transform (PIT) of a sample is F0 at its reward, under a head that has not
seen its prompt. Where the head is right, the PITs of each prompt are uniform on [0, 1]. Those of
all prompts together are so even where the head knows nothing of a prompt, so they are also looked
at prompt by prompt: by the Kolmogorov-Smirnov distance of a prompt's m, which has a known size
where the head is right, and by the distance of F0 from the prompt's own F itself, which has an
estimate without bias from as few as 2 samples.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import kstwo

from vbon_jax.bon.amortised import Prior, f0_and_mass
from vbon_jax.errors import InputError

BINS = 10
LEVEL = 0.05  # of the test of each prompt
MOST_ERROR = 0.1  # root mean square of F0 - F
MOST_POOLED = 0.05  # distance of all PITs from uniform, beside what chance makes of it


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What held-out samples say of a head.

    Attributes:
      prompts: those with at least 2 samples, which count.
      samples: of them all.
      histogram: share of the PITs in each tenth of [0, 1].
      pooled_ks: the largest distance of all PITs' distribution from the uniform one.
      pooled_limit: what is allowed of it.
      prompt_ks: the mean over prompts of the same distance of the prompt's own PITs.
      expected_ks: what that is where the head is right.
      rejected: share of prompts whose distance has a p-value below ``LEVEL``; as much is expected.
      error: the root mean square, over prompts and over the head's own distribution, of F0 - F.
    """

    prompts: int
    samples: int
    histogram: tuple[float, ...]
    pooled_ks: float
    pooled_limit: float
    prompt_ks: float
    expected_ks: float
    rejected: float
    error: float

    @property
    def holds(self) -> bool:
        """Whether the head may be used."""
        return self.error <= MOST_ERROR and self.pooled_ks <= self.pooled_limit

    def as_json(self) -> dict[str, Any]:
        """Its figures by name."""
        return dataclasses.asdict(self) | {"holds": self.holds}

    @classmethod
    def of_json(cls, figures: dict[str, Any]) -> "Calibration":
        """What `as_json` gave."""
        names = {f.name for f in dataclasses.fields(cls)}
        found = {k: v for k, v in figures.items() if k in names}
        return cls(**found | {"histogram": tuple(figures["histogram"])})

    def line(self, concentration: float) -> str:
        """A line for the log, with how many samples the head is worth."""
        return f"amortised: {self._told()}; a head is worth {concentration:.0f} samples"

    def _told(self) -> str:
        return (
            f"F of {self.prompts} held-out prompts is {self.error:.3f} off (root mean square; at "
            f"most {MOST_ERROR:g}), the Kolmogorov-Smirnov distance of a prompt's PITs is "
            f"{self.prompt_ks:.3f} ({self.expected_ks:.3f} where the head is right), "
            f"{self.rejected:.0%} of prompts are rejected at {LEVEL:.0%}, and that of all PITs "
            f"together is {self.pooled_ks:.3f} (at most {self.pooled_limit:.3f})"
        )

    def refuse(self) -> None:
        """Raises InputError unless the head may be used."""
        if not self.holds:
            raise InputError(
                "samples.amortised: the head does not know the rewards of prompts: "
                f"{self._told()}; give more prompts (prompts.train), more samples of each "
                "(samples.m), or set samples.amortised=False"
            )


def pits(f0: np.ndarray, mass: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The PIT of samples, at random within their tie group: F0 + u g0.

    Args:
      f0: head's mass below each reward.
      mass: head's mass of its tie group.
      uniform: numbers in [0, 1).

    Returns:
      float64 of their shape, within [0, 1].
    """
    found = np.asarray(f0, np.float64) + np.asarray(uniform) * np.asarray(mass, np.float64)
    return np.clip(found, 0.0, 1.0)


def of_prior(prior: Prior, rewards: Sequence[np.ndarray], seed: int) -> Calibration:
    """Figures of what a head says of prompts, by samples of theirs that it has not seen.

    Args:
      prior: of P prompts.
      rewards: float32, of each prompt's samples; a prompt may have none.
      seed: of the places within tie groups.

    Raises:
      InputError: no prompt has 2 samples.
    """
    rng, of_prompts = np.random.default_rng(seed), []
    for row, own in enumerate(rewards):
        f0, mass = (np.asarray(x)[0] for x in f0_and_mass(prior, np.array([row]), own[None]))
        of_prompts.append(pits(f0, mass, rng.random(len(own))))
    return calibration(of_prompts)


def calibration(of_prompts: Sequence[np.ndarray]) -> Calibration:
    """Figures of the PITs of held-out prompts.

    Args:
      of_prompts: PITs of each prompt; one with fewer than 2 says nothing here.

    Raises:
      InputError: no prompt has 2.
    """
    sorted_ = [np.sort(x) for x in of_prompts if len(x) >= 2]
    if not sorted_:
        raise InputError(
            "samples.amortised: no prompt has 2 samples, so nothing tells how good the head is: "
            "set samples.m to at least 2, or samples.amortised=False"
        )
    together = np.sort(np.concatenate(sorted_))
    m_P = np.array([len(x) for x in sorted_])
    ks_P = np.array([_distance(x) for x in sorted_])
    error = float(np.sqrt(max(0.0, float(np.mean([_square_error(x) for x in sorted_])))))
    sizes, of_size_P = np.unique(m_P, return_inverse=True)
    expected, most = (np.array([f(m) for m in sizes]) for f in (_expected, _critical))
    # The samples of a prompt share its error: the variance of their mean is 1 / 4 m and that.
    spread = np.sqrt((0.25 / m_P.mean() + error**2) / len(m_P))
    return Calibration(
        prompts=len(m_P),
        samples=int(m_P.sum()),
        histogram=tuple((np.histogram(together, BINS, (0.0, 1.0))[0] / len(together)).tolist()),
        pooled_ks=_distance(together),
        pooled_limit=float(MOST_POOLED + 2 * spread),
        prompt_ks=float(ks_P.mean()),
        expected_ks=float(expected[of_size_P].mean()),
        rejected=float(np.mean(ks_P > most[of_size_P])),
        error=error,
    )


def _expected(m: int) -> float:
    """The mean distance of m uniform samples."""
    return float(kstwo.mean(m))


def _critical(m: int) -> float:
    """The distance that m uniform samples exceed with probability ``LEVEL``."""
    return float(kstwo.isf(LEVEL, m))


def _distance(sorted_M: np.ndarray) -> float:
    """The largest difference of the samples' distribution and the uniform one."""
    place = np.arange(len(sorted_M) + 1) / len(sorted_M)
    return float(max(np.max(place[1:] - sorted_M), np.max(sorted_M - place[:-1])))


def _square_error(sorted_M: np.ndarray) -> float:
    """The integral over u in [0, 1] of (G(u) - u)^2, G the distribution of PITs, without bias.

    With G_m of m samples the integral of (G_m - u)^2 is 1 / (12 m^2) + mean (u_(i) - (2i-1) / 2m)^2
    (Cramer and von Mises), too large by that of G (1 - G) / m, of which G_m (1 - G_m) / (m - 1) is
    an estimate without bias.
    """
    m = len(sorted_M)
    odd = 2 * np.arange(1, m + 1) - 1
    found = 1 / (12 * m**2) + np.mean((sorted_M - odd / (2 * m)) ** 2)
    noise = np.sum(odd * sorted_M) / m**2 - np.mean(sorted_M)
    return float(found - noise / (m - 1))
