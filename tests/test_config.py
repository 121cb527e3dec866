"""Config files and the keys they set."""

import ast
import copy
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from vbon_jax import cli, methods
from vbon_jax import config as st
from vbon_jax.config import groups
from vbon_jax.errors import InputError
from vbon_jax.keys import rows

ROOT = Path(__file__).parents[1]
# Where keys are declared and held against each other, which is not reading them.
DECLARED = ("config/", "keys.py", "training/options.py")


def load(name, *variant):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*variant).to_dict()


@pytest.fixture
def values():
    return load("tabular", "ppo")


def change(values, key, value):
    values = copy.deepcopy(values)
    *groups, name = key.split(".")
    group = values
    for g in groups:
        group = group[g]
    group[name] = value
    return values


FAMILY = {"method.n": (2, 8), "lora.rank": 4}
CONFIGS = [
    ("tabular",), ("tabular", "ppo"), ("tabular", "sweep"), ("reviews",), ("reviews", "text"),
    ("reviews_sweep",),
    ("reviews_sweep", "text"), ("verifier",), ("imdb",), ("imdb", "sweep"), ("tldr",),
    ("tldr", "sweep"), ("chat",), ("smollm2",),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: ":".join(c))
def test_every_config_file_parses(config):
    parsed = st.parse(load(*config))
    given = st.flatten(st.as_dict(parsed)).keys()
    assert given == {key for key, _, _ in rows(st.Config) if ".NAME." not in key}
    assert given == st.defaults_flat().keys()


def test_every_config_file_is_tested():
    assert {p.stem for p in (ROOT / "configs").glob("*.py")} == {name for name, *_ in CONFIGS}


def test_a_config_file_stands_alone():
    """It is the defaults and its differences: no other config file's values flow into it."""
    for path in (ROOT / "configs").glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
        assert imported == {"ml_collections", "vbon_jax.config"}, path.name
        assert len(path.read_text().split('"""', 2)[2].splitlines()) < 100, path.name


def test_the_defaults_are_a_config_of_their_own():
    assert st.parse({}) == st.Config() == st.parse(st.default().to_dict())
    assert st.defaults_flat()["evaluate.temperatures"] == [1.0]
    assert st.defaults_flat()["reward.model.width"] == 64 != st.Config().reference.model.width
    assert st.defaults_flat()["reward.others"] == {}


def test_a_config_file_cannot_misspell_a_key():
    config = st.default()
    config.method.n = 3
    config.sweep.update(vbon=(1, 2.5))
    config.reward.others.length = {"function": "m:f"}  # a name is the user's to choose
    parsed = st.parse(config.to_dict())
    assert parsed.method == dataclasses.replace(st.Config().method, n=3.0)
    assert parsed.sweep.vbon == (1.0, 2.5)
    assert parsed.reward.others == {"length": st.RewardPart(function="m:f")}
    with pytest.raises(AttributeError, match="nn"):
        config.method.nn = 3
    with pytest.raises(KeyError, match="nn"):
        config.method.update(nn=3)
    with pytest.raises(AttributeError, match="methods"):
        config.methods = {}


@pytest.mark.parametrize(
    ("line", "flag", "message"),
    [
        (
            "config.method.nn = 3",
            "seed=1",
            "--config: unknown config key nn: did you mean method.n or evaluate.n?",
        ),
        (
            "config.method.estimatr = ''",
            "seed=1",
            "key estimatr: did you mean method.estimator or ",
        ),
        (
            "pass",
            "train.batchsize=8",
            "key train.batchsize: did you mean train.batch_size or train.",
        ),
        (
            "pass",
            "modle.heads=8",
            "unknown config key modle.heads: did you mean reward.model.heads",
        ),
        ("pass", "xyzzy=8", "unknown config key xyzzy"),
        (
            "config = type(config)({'seed': 1})",
            "train.lam=1",
            "config key train.lam is not in the file: start it from vbon_jax.config.default()",
        ),
    ],
)
def test_a_misspelt_key_is_answered_with_those_that_come_near(tmp_path, line, flag, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vbon_jax import config as vbon_config\n\n\n"
        f"def get_config():\n    config = vbon_config.default()\n    {line}\n    return config\n"
    )
    with pytest.raises(InputError) as error:
        cli.parse(["run", f"--config={path}", f"--config.{flag}"])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method.n", 0.5, "method.n=0.5: must be at least 1"),
        ("method.n", float("nan"), "method.n=nan: must be a finite number"),
        ("method.estimator", "magic", "method.estimator='magic': choose one of smoothed, strict"),
        ("samples.m", 0, "samples.m=0: must be at least 1"),
        ("samples.m", 2.5, "samples.m=2.5: must be int"),
        ("samples.m", True, "samples.m=True: must be int"),
        ("train.whiten", 1, "train.whiten=1: must be bool"),
        ("train.minibatch_size", 100, "train.batch_size=512 is not a multiple"),
        ("train.clip_policy", 1.0, "train.clip_policy=1.0: must be below 1"),
        ("train.learning_rate", 0.0, "train.learning_rate=0.0: must be above 0"),
        ("sampling.temperature", 0.0, "sampling.temperature=0.0: must be above 0"),
        ("evaluate.temperatures", (), "evaluate.temperatures is empty"),
        ("evaluate.temperatures", (0.0,), "evaluate.temperatures has 0.0"),
        ("stages", ("sft", "dance"), "stages names 'dance'"),
        ("reference.model.heads", 3, "reference.model.width=64 is not a multiple"),
        ("prompts.min_tokens", 5, "prompts.min_tokens=5 is more than"),
        ("reward.path", "somewhere", "set one of them"),
        ("data.test_path", "x.jsonl", "data.path is empty"),
        ("data", 3, "data=3: must be a group of keys"),
        ("data", {"path": "a", "hub": "b"}, "data.path='a' and data.hub='b': set one of them"),
        ("data", {"tfds": "a", "hub": "b"}, "data.tfds='a' and data.hub='b': set one of them"),
        ("data", {"path": "a", "tfds": "b"}, "data.path='a' and data.tfds='b': set one of them"),
        ("prompts", {"path": "a", "hub": "b"}, "prompts.path='a' and prompts.hub='b': set one of"),
        ("prompts.format", "chat", "prompts.format=chat: set prompts.path and prompts.test_path"),
        ("prompts.template_arguments", "[1]", "prompts.template_arguments='[1]': must be a JSON"),
        ("log.wandb", "yes", "log.wandb='yes': must be bool"),
        ("method.name", "sft", "method.name='sft': choose one of bon, vbon, ppo, bond, dpo"),
        ("method.objective", "reward", "method.objective='reward': choose one of exact"),
        ("method.beta", 0.0, "method.beta=0.0: must be above 0"),
        ("method.ties", "coin", "method.ties='coin': choose one of random, order"),
        ("bond.form", "forward", "bond.form='forward': choose one of jeffreys, backward"),
        ("bond.anchor_rate", 1.1, "bond.anchor_rate=1.1: must be at most 1"),
        ("offline.labels", "loud", "offline.labels='loud': choose one of hard, soft"),
        ("offline.responses", 1, "offline.responses=1: must be at least 2"),
        ("evaluator.path", "x", "evaluator.path='x' and evaluator.function='f:g': set one of them"),
        (
            "evaluator.model",
            {"layers": 1, "width": 6, "heads": 4, "positions": 8},
            "evaluator.model.width=6 is not a multiple",
        ),
        ("convergence.level", 1.0, "convergence.level=1.0: must be below 1"),
        ("convergence.m", (5, 600), "convergence.m has 600: each must be at least 1 and below "),
        ("convergence.m", (0,), "convergence.m has 0: each must be at least 1"),
        (
            "convergence.m_full",
            400,
            "convergence.m has 400: each must be at least 1 and below convergence.m_full=400",
        ),
        ("sweep.seeds", 0, "sweep.seeds=0: must be at least 1"),
        (
            "sweep.lower_bound_estimator",
            "interval",
            "sweep.lower_bound_estimator='interval': choose one of harmonic, smoothed, exponential",
        ),
        # Tuples hold what they are said to.
        ("sweep.bon", 3, "sweep.bon=3: must be"),
        ("sweep.bon", (2, 2.5), "sweep.bon has 2.5: it must hold whole numbers"),
        ("sweep.bon", (True,), "sweep.bon has True: it must hold whole numbers"),
        ("convergence.m", ("5",), "convergence.m has '5': it must hold whole numbers"),
        ("sweep.vbon", (2.0, "4"), "sweep.vbon has '4': it must hold finite numbers"),
        ("sweep.vbon", (True,), "sweep.vbon has True: it must hold finite numbers"),
        ("sweep.ppo", (float("inf"),), "sweep.ppo has inf: it must hold finite numbers"),
        ("evaluate.temperatures", ("hot",), "evaluate.temperatures has 'hot': it must hold finite"),
        # The grids of a sweep; samples.m = evaluate.m = 200.
        ("sweep.bon", (2, 0), "sweep.bon has 0: it must be at least 1"),
        ("sweep.bon", (201,), "sweep.bon has 201, more than evaluate.m=200"),
        ("sweep.vbon", (0.5,), "sweep.vbon has 0.5: it must be at least 1"),
        ("sweep.lower_bound", (0.5,), "sweep.lower_bound has 0.5: it must be at least 1"),
        ("sweep.bond", (2.0, 1.0), "sweep.bond=1: bond has the KL coefficient 1/(n-1)"),
        ("sweep.bonbon", (1,), "sweep.bonbon=1: bonbon needs a best and a worst"),
        ("sweep.bonbon", (201,), "sweep.bonbon has 201, more than samples.m=200"),
        ("sweep.bon_sft", (0,), "sweep.bon_sft has 0: it must be at least 1"),
        ("sweep.bon_sft", (201,), "sweep.bon_sft has 201, more than samples.m=200"),
        ("sweep.m", (0,), "sweep.m has 0: it must be at least 1"),
        ("sweep.m", (4, 201), "sweep.m has 201, more than samples.m=200"),
        ("sweep.ppo", (0.0,), "sweep.ppo has 0.0: it must be above 0"),
        ("sweep.dpo", (-1.0,), "sweep.dpo has -1.0: it must be above 0"),
        ("sweep.temperatures", (0.0,), "sweep.temperatures has 0.0: it must be above 0"),
    ],
)
def test_bad_values_are_named(values, key, value, message):
    values["evaluator"]["function"] = "f:g"
    st.parse(values)
    with pytest.raises(InputError) as error:
        st.parse(change(values, key, value))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.num_layers_unfrozen": 0}, "train.num_layers_unfrozen=0 trains nothing: -1 trains"),
        ({"lora.rank": 4, "train.num_layers_unfrozen": 2}, "lora.rank=4 and train.num_layers_unfr"),
        ({"lora.targets": ("q", "w")}, "lora.targets names 'w': choose from q, k, v, out, gate, u"),
        ({"lora.rank": 4, "lora.targets": ()}, "lora.targets is empty: name at least one"),
        ({"export.form": "adapter"}, "export.form=adapter needs adapters: set lora.rank, which is"),
        ({"train.group": 3}, "train.group=3 does not divide train.batch_size=512"),
        ({"train.warmup": 1200}, "train.warmup=1200 must be less than train.iterations=1200"),
        ({"train.baseline": "group"}, "train.baseline=group compares responses to one prompt, an"),
        (
            {"train.start": "replay", "method.name": "bond", "bond.form": "jeffreys"},
            "train.start=replay: bond learns from responses of its anchor, not from stored samples",
        ),
        (
            {"train.replay": 1, "method.name": "bond", "bond.form": "jeffreys"},
            "train.replay=1: bond learns from responses of its anchor, not from stored samples; se",
        ),
        ({"method.objective": "jeffreys"}, "method.objective=jeffreys needs stored samples beside"),
        (
            {"samples.adaptive": 0.5, "train.replay": 1},
            "samples.adaptive=0.5 leaves prompts with fewer than samples.m=200 samples, and",
        ),
        (
            {"samples.adaptive": 0.5, "method.name": "dpo"},
            "samples.adaptive=0.5 leaves prompts with fewer than samples.m=200 samples, and",
        ),
        (
            {"samples.adaptive": 0.5, "sweep.vbon": (2, 32)},
            "samples.adaptive_n=8: n=32 is trained for, whose band is wider: give at least 32",
        ),
        ({"samples.prompts": 3}, "samples.prompts=3 leaves prompts without samples: set samples"),
        (
            {"samples.amortised": True, "samples.m": 1},
            "samples.amortised=True does not go with samples.m=1: its log F needs 2 samples of a",
        ),
        (
            {"samples.amortised": True, "method.ties": "order"},
            "samples.amortised=True does not go with method.ties=order",
        ),
        (
            {"samples.amortised": True, "method.estimator": "exponential"},
            "samples.amortised=True does not go with method.estimator=exponential",
        ),
        (
            {"samples.amortised": True, "method.name": "dpo"},
            "samples.amortised=True does not go with method.name=dpo",
        ),
        (
            {"samples.amortised": True, "samples.prompts": 3, "train.start": "weighted"},
            "samples.prompts=3 leaves prompts without samples, and train.start=weighted needs some",
        ),
        (
            {"train.replay": 3, "train.group": 256},
            "train.batch_size=512 responses and train.replay=3 stored samples for every train.grou",
        ),
        (
            {"train.replay": 1, "train.lookahead": 4, "train.value_network": "prefix"},
            "train.replay=1 and train.lookahead=4: next tokens are not known of stored samples",
        ),
        ({"train.lookahead": 4}, "train.lookahead=4 reads values of prefixes, and train.value_net"),
        (
            {"train.lookahead": 4, "train.value_network": "prefix", "method.ties": "order"},
            "train.lookahead=4 ranks responses that were not drawn, which have no place in the ord",
        ),
        (
            {"train.start": "weighted", "offline.batch_size": 6401},
            "offline.batch_size=6401 is more than the 6400 examples of prompts.train=1 x offline.p",
        ),
        (
            {"train.lookahead": 4, "train.value_network": "prefix", "memory.rollout_rows": 8},
            "memory.rollout_rows=8 and train.lookahead=4: next tokens are looked at where each res",
        ),
        ({"memory.accumulate": 3}, "memory.accumulate=3 does not divide train.minibatch_size=64"),
        ({"memory.accumulate": 2, "method.name": "dpo"}, "memory.accumulate=2: dpo is trained wit"),
        ({"memory.accumulate": 2, "method.name": "bond"}, "memory.accumulate=2: bond is trained w"),
        ({"train.value_network": "reward"}, "train.value_network=reward starts from a reward mode"),
        ({"evaluate.temperatures": (1.0, 1.0)}, "evaluate.temperatures=(1.0, 1.0) names one twice"),
        ({"evaluate.temperatures": (101,)}, "evaluate.temperatures has 101.0: each must be a numb"),
        ({"reward.others": {"a": {}}}, "reward.others.a.path and .function are empty: set one"),
        ({"reward.others": {"a": {"path": "p", "function": "f"}}}, "reward.others.a.path='p' and "),
        ({"prompts.format": "tldr", "prompts.hub": "a/b"}, "prompts.format=tldr: set prompts.path"),
        ({"prompts.hub": "a/b", "prompts.test_path": "t"}, "prompts.hub='a/b' and prompts.t"),
        ({"stages": ()}, "stages is empty: choose from sft, reward"),
        ({"evaluate.n": (2,)}, "evaluate.n=(2.0,): method.n=8.0 is of one policy; leave it empty"),
        ({"method.n": (2, 8)}, "method.n=(2.0, 8.0) and lora.rank=0: the gates that n opens are"),
        (FAMILY | {"method.name": "ppo"}, "method.n=(2.0, 8.0) and method.name=ppo: only vbon"),
        (FAMILY | {"train.start": "weighted"}, "and train.start=weighted: what it starts from wou"),
        (FAMILY | {"train.value_network": "prefix"}, "and train.value_network=prefix: values must"),
        (FAMILY | {"memory.rollout_rows": 8}, "and memory.rollout_rows=8: a row would go on with"),
        (FAMILY | {"sweep.vbon": (2,)}, "method.n=(2.0, 8.0) is of one policy for every n, and a "),
        (FAMILY | {"stages": ("sft", "sweep")}, "leave the sweep out, or set method.n to a numb"),
        (FAMILY | {"evaluate.n": (9,)}, "evaluate.n has 9: it must be from 1 to 8, as method.n="),
        (FAMILY | {"export.form": "adapter"}, "export.form=adapter: the policies of a family are"),
        (
            FAMILY | {"samples.adaptive": 0.5, "samples.adaptive_n": 7},
            "samples.adaptive_n=7: n=8 is trained for, whose band is wider: give at least 8",
        ),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_together_are_named(values, changes, message):
    for key, value in changes.items():
        values = change(values, key, value)
    with pytest.raises(InputError) as error:
        st.parse(values)
    assert message in str(error.value)


def test_what_goes_together_is_taken(values):
    """The neighbours of what is refused."""
    for changes in (
        {"lora.rank": 4, "export.form": "adapter"},
        FAMILY | {"evaluate.n": (1, 2.5, 8)},
        {"train.num_layers_unfrozen": 2},
        {"memory.accumulate": 2},
        {"memory.accumulate": 2, "method.name": "bond", "bond.form": "backward"},
        {"reward.function": "", "train.value_network": "reward"},
        {"evaluate.temperatures": (0.5, 100)},
        {"prompts.format": "chat", "prompts.hub": "a/b"},
    ):
        changed = values
        for key, value in changes.items():
            changed = change(changed, key, value)
        st.parse(changed)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bonbon", {"method.n": 1}, "method.n=1: bonbon needs a best and a worst, n of at least 2"),
        ("bonbon", {"method.n": 2.5}, "method.n=2.5: bonbon takes the best of a whole number n"),
        ("bonbon", {"method.n": 201}, "method.n=201: bonbon takes the best of a whole number n of "
         "the samples.m=200 stored ones"),
        ("bon_sft", {"method.n": 2.5}, "method.n=2.5: bon_sft takes the best of a whole number n"),
        ("bon_sft", {"method.n": 201}, "method.n=201: bon_sft takes the best"),
        ("bond", {"method.n": 1}, "method.n=1: bond has the KL coefficient 1/(n-1), so n must be"),
        ("dpo", {"offline.responses": 4, "offline.pairs": 7}, "offline.pairs=7 is more than the 6 "
         "pairs of offline.responses=4"),
        ("dpo", {"offline.responses": 201}, "offline.responses=201 is more than samples.m=200"),
        ("bon_sft", {"offline.pairs": 63}, "offline.batch_size=64 is more than the 63 examples of "
         "prompts.train=1 x offline.pairs=63"),
        ("bonbon", {"offline.pairs": 31, "prompts.train": 2}, "than the 62 examples"),
    ],
)  # fmt: skip
def test_what_a_method_cannot_do_is_named(values, name, changes, message):
    for key, value in changes.items():
        values = change(values, key, value)
    st.parse(values)  # vbon does not mind
    with pytest.raises(InputError) as error:
        st.parse(change(values, "method.name", name))
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["sweep.dpo", "method.name"])
def test_a_sweep_over_dpo_needs_its_pairs_as_dpo_does(values, key):
    values = change(change(values, "offline.responses", 4), "offline.pairs", 7)
    with pytest.raises(InputError, match=r"offline\.pairs=7 is more than the 6 pairs"):
        st.parse(change(values, key, "dpo" if key == "method.name" else (0.1,)))


def test_what_methods_can_just_do_is_taken(values):
    for name, n in (("bon_sft", 1), ("bon_sft", 200), ("bonbon", 2), ("bonbon", 200),
                    ("bond", 1.01), ("vbon", 1), ("ppo", 1), ("bon", 1000)):  # fmt: skip
        st.parse(change(change(values, "method.name", name), "method.n", n))
    # Samples made elsewhere bring prompts of their own number.
    few = change(change(values, "method.name", "bon_sft"), "offline.pairs", 1)
    st.parse(change(few, "prompts.path", "p.jsonl"))
    st.parse(change(few, "samples.path", "s.jsonl"))
    parsed = st.parse(change(values, "sweep", values["sweep"] | {"vbon": [1, 2.5], "bon": [200]}))
    assert parsed.sweep.vbon == (1.0, 2.5) and parsed.sweep.bon == (200,)
    assert all(isinstance(n, float) for n in parsed.sweep.vbon)


@pytest.mark.parametrize("estimator", ["strict", "interval"])
@pytest.mark.parametrize("objective", ["lower_bound", "jensen_bound"])
def test_estimators_without_a_finite_log_f_are_refused_for_the_bounds(values, estimator, objective):
    values = change(values, "method.estimator", estimator)
    st.parse(values)
    with pytest.raises(InputError, match=f"method.estimator={estimator}"):
        st.parse(change(values, "method.objective", objective))


def test_unknown_keys_are_named(values):
    with pytest.raises(InputError, match=r"unknown config key method\.nn: allowed here are"):
        st.parse(change(values, "method.nn", 1))
    with pytest.raises(
        InputError, match=r"unknown config key methods: allowed here are seed, stag"
    ):
        st.parse(values | {"methods": {}})
    with pytest.raises(
        InputError, match=r"unknown config key reward\.others\.a\.n: allowed here are"
    ):
        st.parse(change(values, "reward.others", {"a": {"function": "m:f", "n": 1}}))


def test_missing_keys_take_their_defaults(values):
    """Those of the group at its place: the reward's model is smaller than the reference's."""
    del values["train"]["lam"], values["reward"]["model"]["width"], values["mesh"]
    parsed = st.parse(values)
    assert (
        parsed.train.lam == 0.95 and parsed.train.learning_rate == values["train"]["learning_rate"]
    )
    assert parsed.reward.model == st.Model(layers=2, width=64, heads=4, positions=8)
    assert parsed.mesh == groups.MeshShape(1, 1, 1)


def test_ints_are_read_as_floats_where_floats_are_meant(values):
    assert st.parse(change(values, "method.n", 4)).method.n == 4.0


def test_every_key_is_read_somewhere():
    """A key that only its declaration mentions is one that nothing reads."""
    read, package = set(), ROOT / "vbon_jax"
    for path in package.rglob("*.py"):
        if not str(path.relative_to(package)).startswith(DECLARED):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
    # The methods' grids and groups are read through their records.
    read |= methods.SERIES.keys() | {f"{label}_estimator" for label in methods.SERIES}
    unread = {key for key, _, _ in rows(st.Config) if key.split(".")[-1] not in read}
    assert not unread


def test_every_key_is_documented():
    """Its row in the config reference: a name of its own, a sentence that fits a table's cell."""
    found = rows(st.Config)
    assert len({name for name, _, _ in found}) == len(found)
    for name, doc, _ in found:
        assert doc[0].isupper() and doc.endswith("."), name
        assert not set("|\n") & set(doc), name
