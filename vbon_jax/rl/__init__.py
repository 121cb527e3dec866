"""Losses and advantages of policy optimization: pure functions of arrays."""

from vbon_jax.rl import (
    bond,
    chunked,
    gae,
    kl,
    masking,
    next_token,
    pointwise,
    ppo,
    preference,
    shaping,
)

__all__ = [
    "bond",
    "chunked",
    "gae",
    "kl",
    "masking",
    "next_token",
    "pointwise",
    "ppo",
    "preference",
    "shaping",
]
