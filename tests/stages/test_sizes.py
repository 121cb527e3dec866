"""Sizes that no memory holds."""

import dataclasses

import pytest

from vbon_jax import config
from vbon_jax.errors import InputError
from vbon_jax.stages import sizes

GIB = 2**30


def changed(**groups):
    found = config.parse({})
    for name, values in groups.items():
        found = dataclasses.replace(
            found, **{name: dataclasses.replace(getattr(found, name), **values)}
        )
    return found


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"samples": {"m": 1_000_000}}, r"prompts.train=800 x samples.m=1000000 needs at least 74"),
        ({"sampling": {"batch_size": 4_000_000}}, r"sampling.batch_size=4000000 x sampling.max"),
        ({"evaluate": {"m": 1_000_000}}, r"prompts.test=128 x evaluate.m=1000000 needs at least"),
    ],
)  # fmt: skip
def test_what_cannot_be_names_its_keys_and_the_way_out(groups, words):
    with pytest.raises(InputError, match=words + r".*`vbon plan`"):
        sizes.refuse_impossible(changed(**groups), 8 * GIB, 80 * GIB)


def test_sizes_of_real_runs_pass():
    large = changed(samples={"m": 20_000}, sampling={"batch_size": 4_096, "max_new_tokens": 512})
    sizes.refuse_impossible(large, 64 * GIB, 80 * GIB)
