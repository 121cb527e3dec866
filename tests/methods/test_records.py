"""The records of the methods: what the config, the sweep and the Python API read off them."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from vbon_jax import config as configs
from vbon_jax import methods
from vbon_jax.config import groups
from vbon_jax.methods import base, bond, jbond
from vbon_jax.methods.learning import Job, Training
from vbon_jax.training.options import Offline, Train

OF_EACH = pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: m.options.__name__)
ONLINE = pytest.mark.parametrize(
    "method", [m for m in methods.METHODS if m.online], ids=lambda m: m.options.__name__
)


def parsed(**groups):
    """The default config, changed."""
    c = configs.default()
    for name, changes in groups.items():
        c[name].update(changes)
    return configs.parse(c.to_dict())


def chosen_by(method):
    """A config that means this record."""
    for form in ("jeffreys", "backward"):
        c = parsed(method={"name": method.name}, bond={"form": form})
        if method.when(c):
            return c
    raise AssertionError(f"no config means {method.name}")


def job_of(method, config):
    """Of a tiny decoder, with the default options."""
    train = Train(iterations=2, batch_size=8, minibatch_size=4, ppo_epochs=4)
    training = Training(train, Offline(batch_size=8))
    return Job(method, method.options(), training, config, 3)


def test_labels_names_and_options_are_unique():
    series = [s for m in methods.METHODS for s in m.series]
    assert len({s.label for s in series}) == len(series) == len(methods.SERIES)
    for field in ("name", "color", "marker", "doc"):  # a reader tells the curves apart by each
        values = [getattr(s, field) for s in series]
        assert len(set(values)) == len(values), field
    assert len({m.options for m in methods.METHODS}) == len(methods.METHODS)
    for label, (method, one) in methods.SERIES.items():
        assert one.label == label and one in method.series


def test_names_are_the_choices_of_the_config():
    (name,) = (f for f in dataclasses.fields(groups.Method) if f.name == "name")
    assert name.metadata["choices"] == methods.NAMES
    assert set(methods.NAMES) == {methods.BEST_OF_N, *(m.name for m in methods.METHODS)}
    assert len(set(methods.NAMES)) == len(methods.NAMES)
    assert methods.BEST_OF_N not in [m.name for m in methods.METHODS]


def test_groups_are_in_the_config_and_its_defaults():
    groups = [m.group for m in methods.METHODS if m.group]
    assert ("bond", jbond.Bond) in groups
    fields = {f.name: f.type for f in dataclasses.fields(configs.Config)}
    c, default = parsed(), configs.default()
    for name, cls in groups:
        assert fields[name] is cls
        assert getattr(c, name) == cls()
        assert set(default[name]) == {f.name for f in dataclasses.fields(cls)}
    assert len({name for name, _ in groups}) == len(groups)


def test_series_are_grids_of_the_sweep():
    fields = {f.name: f for f in dataclasses.fields(groups.Sweep)}
    for label, (method, series) in methods.SERIES.items():
        assert fields[label].type == (tuple[int, ...] if method.whole_n else tuple[float, ...])
        assert fields[label].metadata["doc"] == series.doc
        estimator = fields.get(f"{label}_estimator")
        assert (estimator is not None) == bool(series.estimators)
        if estimator is not None:
            assert estimator.default == series.estimators[0]
            assert estimator.metadata["choices"] == series.estimators


@OF_EACH
def test_what_a_series_varies_and_fixes_are_options(method):
    names = {f.name for f in dataclasses.fields(method.options)}
    for series in method.series:
        assert series.varies in ("n", "beta") and series.varies in names
        assert series.fixed.keys() <= names - {series.varies}
        estimators = series.estimators or (method.options().estimator,)
        for estimator in estimators:
            options = method.options(**(series.fixed | {"estimator": estimator}))
            assert method.check(options) == ""


@OF_EACH
def test_the_config_leads_to_the_record_and_its_options_back_to_it(method):
    c = chosen_by(method)
    assert methods.of_config(c) is method
    options = method.from_config(c)
    assert type(options) is method.options and isinstance(options, methods.Options)
    assert options == method.options()  # the defaults of the config are those of Python
    assert methods.of_options(options) is method


@pytest.mark.parametrize("form", ["jeffreys", "backward"])
@pytest.mark.parametrize("name", [n for n in methods.NAMES if n != methods.BEST_OF_N])
def test_one_record_is_meant_by_a_config(name, form):
    c = parsed(method={"name": name}, bond={"form": form})
    (meant,) = (m for m in methods.METHODS if m.name == name and m.when(c))
    assert methods.of_config(c) is meant


def test_the_form_chooses_between_bond_and_jbond():
    c = parsed(
        method={"name": "bond", "n": 3.0, "estimator": "smoothed", "ties": "order"},
        bond={"form": "jeffreys", "jeffreys": 0.3, "anchor_rate": 0.2, "beta": 0.7},
    )
    assert methods.of_config(c) is jbond.METHOD
    assert jbond.METHOD.from_config(c) == jbond.JBOND(
        n=3.0, estimator="smoothed", ties="order", jeffreys=0.3, anchor_rate=0.2, beta=0.7
    )  # beta is of its own group, not method.beta
    backward = dataclasses.replace(c, bond=dataclasses.replace(c.bond, form="backward"))
    assert methods.of_config(backward) is bond.METHOD
    assert bond.METHOD.from_config(backward) == bond.BOND(n=3.0, estimator="smoothed", ties="order")


@pytest.mark.parametrize("other", [None, "vbon", {"n": 8}, methods.Options(), base.Options])
def test_options_of_no_method_are_refused(other):
    known = ", ".join(m.options.__name__ for m in methods.METHODS)
    message = f"method={other!r}: give the options of a method, one of {known}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        methods.of_options(other)


@OF_EACH
def test_the_first_state_holds_what_the_record_says(method, config, params):
    first = job_of(method, config).first_state(params, jax.random.key(0))
    wanted = {"decoder"}
    wanted |= {"value"} if method.values else set()
    wanted |= {"anchor"} if method.online and method.learns.anchor else set()
    assert first.params.keys() == wanted


@ONLINE
def test_the_sources_of_a_program_are_in_the_first_state(method, config, params):
    job = job_of(method, config)
    first, program = job.first_state(params, jax.random.key(0)), job.program()
    assert program.sources == method.learns.sources and program.sources[0] == "decoder"
    for source in program.sources:  # each can respond: it is a policy of the reference's shape
        jax.tree.map(
            np.testing.assert_array_equal, jax.device_get(first.params[source]),
            jax.device_get(params),
        )  # fmt: skip
    assert ("anchor" in program.sources) == method.learns.anchor


@OF_EACH
def test_only_online_methods_have_values_microbatches_and_passes(method, config):
    job = job_of(method, config)
    if method.online:
        passes = 1 if method is jbond.METHOD else 4
        assert job.steps_an_iteration == passes * 2
        assert method.check_samples(job.training.offline, 1) == ""  # it needs none
        assert method.values == method.microbatches == (method is not jbond.METHOD)
    else:
        assert not method.values and not method.microbatches
        assert job.offline_setup().loss is method.learns.loss
