"""A run that trains one policy for every n: from training to the page, and what is exported."""

import json

import jax
import numpy as np
import pytest

from tests.stages.test_stages import assert_same, policy, vbon
from vbon_jax.models import hf
from vbon_jax.sampling import family as families

FLAGS = (
    "--config.method.n=(2, 8)",
    "--config.lora.rank=4",
    "--config.lora.targets=('q', 'v', 'up')",
    "--config.train.group=8",
    "--config.lora.alpha=64",
    "--config.train.learning_rate=0.01",
    "--config.train.iterations=20",
    "--config.train.checkpoint_every=20",
    "--config.train.average_half_life=3",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("family")
    assert vbon("run", workdir, *FLAGS) == 0
    return workdir


def rows_of(workdir, policy):
    rows = json.loads((workdir / "evaluation.json").read_text())["rows"]
    return [row for row in rows if row["policy"] == policy]


def test_the_whole_curve_is_measured(workdir):
    """Best-of-n and policy at 2, 4 and 8, each held against its own best-of-n."""
    own, bon = rows_of(workdir, "vbon"), rows_of(workdir, "bon")
    assert [row["n"] for row in own] == [row["n"] for row in bon] == [2.0, 4.0, 8.0]
    assert all(np.isfinite(row["kl_bon"]) and row["kl_bon_ci95"] for row in own)
    assert all(row["kl_bon"] is not None for row in bon)  # each of its own n
    kls = [row["kl_ref"] for row in own]
    assert 0 < kls[0] < kls[1] < kls[2]
    exact = json.loads((workdir / "evaluation.json").read_text())["exact_family"]
    assert [row["n"] for row in exact] == [2.0, 4.0, 8.0]
    for measured, row in zip(own, exact, strict=True):
        assert measured["kl_ref"] == pytest.approx(row["kl_ref"], rel=0.4)
        assert row["reference_kl_bon"] > 0
    metrics = (workdir / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["rollout_log_prob_error"] < 1e-4 for line in metrics)
    for name in ("win_rate_vs_kl", "training_curves", "reward_histograms", "family"):
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 10_000


def test_the_last_iterate_is_measured_beside_the_average(workdir):
    """At every n; its weights are the others' after the same iterations."""
    own, last = rows_of(workdir, "vbon"), rows_of(workdir, "vbon, last iterate")
    assert [row["n"] for row in last] == [2.0, 4.0, 8.0]
    for average, row in zip(own, last, strict=True):
        assert row["kl_ref"] > average["kl_ref"] > 0  # the average is of earlier weights too
    reference = sampler(workdir, 1.0)
    found = families.load(workdir / "last_iterate", reference)
    assert found.n == (2.0, 8.0)
    assert_same(found.at(1.0).model.params, reference.model.params)


def test_the_largest_is_exported_and_any_other_when_asked(workdir, capfd):
    """As an ordinary model: log-probs in transformers are those of the adapters opened for n."""
    import torch
    import transformers

    _, params = hf.load_decoder(workdir / "reference")
    assert_same(policy(workdir), jax.device_get(at(workdir, 8.0)))
    assert vbon("export", workdir, *FLAGS, "--n=3") == 0
    assert "is the policy for n=3" in capfd.readouterr().err
    assert_same(policy(workdir), jax.device_get(at(workdir, 3.0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(workdir / "policy")
    tokens = np.random.default_rng(0).integers(0, params["wte"].shape[0], (8, 5))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.log_softmax(-1).numpy()
    np.testing.assert_allclose(log_probs(workdir, 3.0, tokens), theirs, atol=1e-4)
    assert np.abs(log_probs(workdir, 8.0, tokens) - theirs).max() > 1e-3
    assert vbon("export", workdir, *FLAGS, "--n=1") == 0
    assert_same(policy(workdir), params)


def at(workdir, n):
    return sampler(workdir, n).model.params


def sampler(workdir, n):
    from vbon_jax import api

    reference = api.load_model(workdir / "reference", stop_at_eos=False, max_new_tokens=4)
    return families.load(workdir / "family", reference).at(n)


def log_probs(workdir, n, tokens):
    from vbon_jax.models import decoder

    model = sampler(workdir, n).model
    hidden = decoder.hidden(model.params, model.config, tokens, np.ones(tokens.shape, bool))
    return np.asarray(jax.nn.log_softmax(decoder.logits(model.params, model.config, hidden)))


def test_generate_draws_from_the_policy_of_an_n(workdir, capfd):
    def drawn(*flags):
        words = ("--prompt=a", "--config.generate.count=24")
        assert vbon("generate", workdir, *FLAGS, *words, *flags) == 0
        found = capfd.readouterr()
        said.append(found.err)
        return [json.loads(line)["response"] for line in found.out.splitlines()]

    said = []
    assert drawn() == drawn("--n=8") != drawn("--n=1")
    assert drawn("--n=1") == drawn("--config.generate.model=reference")
    drawn("--n=4", "--config.generate.model=corrected")
    assert "where best-of-n draws 4" in said[-1]


def test_the_n_of_a_budget_is_found(workdir, capfd):
    """Of a KL between those measured at two n, an n between them."""
    own = {row["n"]: row["kl_ref"] for row in rows_of(workdir, "vbon")}
    target = (own[2.0] + own[8.0]) / 2
    assert vbon("export", workdir, *FLAGS, f"--kl={target}") == 0
    said = capfd.readouterr().err
    n = float(said.split("is the policy for n=")[1].split()[0])
    assert 2 < n < 8
    assert vbon("export", workdir, *FLAGS, "--kl=50") == 2
    assert "--kl=50: the family has 0 at n=1 and" in capfd.readouterr().err
    assert vbon("generate", workdir, *FLAGS, "--prompt=a") == 2  # nothing is half exported
    assert vbon("export", workdir, *FLAGS, "--reward=1e9") == 2
    assert "--reward=1e+09: the family has" in capfd.readouterr().err
