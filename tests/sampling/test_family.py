"""A family on disk and in use: the policy of any n, as a model of its own."""

import jax
import numpy as np
import pytest

from tests.training import tiny
from vbon_jax.errors import InputError
from vbon_jax.models import family as gates
from vbon_jax.models import trainable
from vbon_jax.sampling import family
from vbon_jax.sampling.family import Family


@pytest.fixture(scope="module")
def of_all(config, params, mesh):
    what = trainable.Trainable(rank=2, targets=("q",))
    own = gates.gated(trainable.start(params, what, jax.random.key(1)), config.width)
    own = jax.tree.map(lambda x: x + 0.3, own)
    settings = {"temperature": 1.0, "max_new_tokens": 4, "end_ids": (3,), "pad_id": 0}
    return Family(tiny.sampler(config, params, mesh, **settings), own, (2.0, 32.0), 8.0)


def kernel(sampler):
    return np.asarray(sampler.model.params["blocks"]["attention"]["q"]["kernel"])


def test_the_policy_of_an_n_has_its_weights_merged(of_all):
    """W + (alpha / r) B diag(g(log n)) A, in float64."""
    tree = {k: np.float64(x) for k, x in of_all.own["blocks"]["attention"]["q"].items()}
    base = kernel(of_all.reference)
    for n in (3.0, 32.0):
        g = np.einsum("J,LJR->LR", np.float64(gates.features(n, 32.0)), tree["lora_gate"])
        added = 4.0 * np.einsum("LIR,LR,LRO->LIO", tree["lora_a"], g, tree["lora_b"])
        np.testing.assert_allclose(
            kernel(of_all.at(n)), base + added.reshape(base.shape), atol=1e-5
        )
        gain = np.float64(gates.features(n, 32.0)) @ np.float64(of_all.own["ln_f"]["gain_gate"])
        scale = of_all.reference.model.params["ln_f"]["scale"] + gain
        np.testing.assert_allclose(of_all.at(n).model.params["ln_f"]["scale"], scale, atol=1e-5)
    same = (of_all.at(1.0).model.params, of_all.reference.model.params)
    jax.tree.map(np.testing.assert_array_equal, *same)


@pytest.mark.parametrize("n", [0.5, 33.0])
def test_an_n_that_was_not_trained_for_is_refused(of_all, n):
    with pytest.raises(InputError, match=rf"n={n:g}: the family was trained for n from 1 to 32"):
        of_all.at(n)


def test_it_is_read_back_as_it_was(of_all, tmp_path):
    of_all.save(tmp_path / "family")
    found = family.load(tmp_path / "family", of_all.reference)
    assert (found.n, found.lora_alpha) == ((2.0, 32.0), 8.0)
    np.testing.assert_array_equal(kernel(found.at(5.0)), kernel(of_all.at(5.0)))


def test_what_is_no_family_is_refused(of_all, tmp_path):
    with pytest.raises(InputError, match="holds no family of policies"):
        family.load(tmp_path, of_all.reference)
    of_all.save(tmp_path)
    path = tmp_path / family.FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="holds no family of policies"):
        family.load(tmp_path, of_all.reference)
    fewer = jax.tree.map(lambda x: x[:1], of_all.own["blocks"])  # layers
    own = {**of_all.own, "blocks": fewer}
    Family(of_all.reference, own, (2.0, 4.0), 8.0).save(tmp_path)
    with pytest.raises(InputError, match=r"lora_\w+ \(1, .* has no place in this reference"):
        family.load(tmp_path, of_all.reference)


def test_looks_double_up_to_the_largest():
    assert family.steps((2.0, 32.0)) == (2.0, 4.0, 8.0, 16.0, 32.0)
    assert family.steps((1.5, 12.0)) == (2.0, 4.0, 8.0, 12.0)
