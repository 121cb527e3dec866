import functools
import os
import signal
import sys
import time
import types

import numpy as np
import pytest

from vbon_jax import signals
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.rewards import function


@pytest.fixture
def module():
    m = types.ModuleType("a_users_reward")
    m.length = lambda prompts, responses: [len(r) / 4 for r in responses]
    m.boom = lambda prompts, responses: 1 / 0
    m.short = lambda prompts, responses: [1.0]
    m.nan = lambda prompts, responses: [0.0, float("nan")]
    m.inf = lambda prompts, responses: [float("-inf"), 0.0]
    m.beyond = lambda prompts, responses: [0.0, 1e39]
    m.integer = lambda prompts, responses: [0, 10**400]
    m.none = lambda prompts, responses: [None, 0.0]
    m.words = lambda prompts, responses: [1.0, "two"]
    m.number = 3
    sys.modules["a_users_reward"] = m
    yield m
    del sys.modules["a_users_reward"]


def test_what_a_function_prints_is_not_on_standard_output(tmp_path, monkeypatch, capfd):
    """That of `vbon generate` is JSON lines; neither on import nor when called."""
    (tmp_path / "loud_reward.py").write_text(
        "print('imported')\ndef f(p, r):\n    print('called')\n    return [0.5]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = function.load("loud_reward:f")
    assert function.call("f", found, ["a"], ["b"]).tolist() == [0.5]
    assert capfd.readouterr() == ("", "imported\ncalled\n")


def test_a_function_that_ends_the_process_is_at_fault():
    with pytest.raises(InputError, match=r"raised SystemExit: 3"):
        function.call("f", lambda p, r: sys.exit(3), ["a"], ["b"])


def test_a_function_that_does_not_return_is_interrupted_by_a_signal(monkeypatch):
    monkeypatch.setattr(signals, "CALL_SECONDS", 0.1)

    def endless(prompts, responses):
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    with signals.StopSignal() as stop:
        with pytest.raises(signals.Interrupted):
            function.call("endless", endless, ["a"], ["b"])
        assert stop.take() == signal.SIGTERM


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("length", "write it as module:function"),
        (":length", "write it as module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("a_users_reward:missing", "has no callable 'missing'"),
        ("a_users_reward:number", "has no callable 'number'"),
    ],
)
def test_bad_names(module, name, message):
    with pytest.raises(InputError, match=message):
        function.load(name)


def test_fractions_survive(module):
    out = function.call("m:f", function.load("a_users_reward:length"), ["p", "p"], ["abc", "abcde"])
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, [0.75, 1.25])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boom", "raised ZeroDivisionError.*first of it prompt='p0' response='r0'"),
        ("short", "returned 1 values for 2 responses"),
        ("nan", "returned NaN for prompt='p1' response='r1'.*finite in float32; clip it"),
        ("inf", "returned -inf for prompt='p0' response='r0' .1 of 2 in this batch.*clip it"),
        ("beyond", r"returned 1e\+39 for prompt='p1' response='r1'.*finite in float32; clip it"),
        ("integer", "returned 10000.*0 for prompt='p1' response='r1'"),
        ("none", "returned None, not a number, for prompt='p0' response='r0'"),
        ("words", "returned 'two', not a number, for prompt='p1' response='r1'"),
    ],
)
def test_what_a_function_may_not_do(module, name, message):
    full = f"a_users_reward:{name}"
    with pytest.raises(InputError, match=message):
        function.call(full, function.load(full), ["p0", "p1"], ["r0", "r1"])


def test_large_rewards_that_are_finite_are_kept(module):
    module.large = lambda prompts, responses: [1e30, -3.4e38]
    found = function.call("m:f", module.large, ["p", "p"], ["a", "b"])
    np.testing.assert_array_equal(found, np.float32([1e30, -3.4e38]))


def test_the_text_leaves_eos_and_padding_out(module):
    seen = []
    module.record = lambda prompts, responses: seen.append((prompts, responses)) or [0.0, 1.0]
    reward = function.FunctionReward(
        "a_users_reward:record", lambda prompts, rows: ["".join(map(str, r)) for r in rows], (9,)
    )
    tokens = np.array([[1, 2, 9, 0], [3, 0, 4, 5]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    reward([Prompt(0, "a", (1,)), Prompt(1, "b", (2,))], None, None, tokens, mask)
    assert seen == [(["a", "b"], ["12", "3045"])]


def test_messages_name_the_key_the_function_came_from(module):
    with pytest.raises(InputError, match=r"evaluator\.function='nothing'"):
        function.FunctionReward("nothing", lambda prompts, rows: [], (), "evaluator")
    module.bad = lambda prompts, responses: [float("nan")]
    reward = function.FunctionReward(
        "a_users_reward:bad", lambda prompts, rows: ["r"], (), "evaluator"
    )
    with pytest.raises(InputError, match=r"evaluator\.function='a_users_reward:bad' returned NaN"):
        reward([Prompt(0, "a", (1,))], None, None, np.ones((1, 1), int), np.ones((1, 1), bool))


def test_a_callable_itself_is_named_after_its_definition(module):
    def halves(prompts, responses):
        return [len(r) / 2 for r in responses]

    class Scorer:
        def __call__(self, prompts, responses):
            return ["x"]

    def score(given, response="abc"):
        reward = function.FunctionReward(given, lambda prompts, rows: [response], ())
        return reward([Prompt(0, "a", (1,))], None, None, np.ones((1, 1)), np.ones((1, 1), bool))

    assert score(halves).tolist() == [1.5]
    assert score(functools.partial(module.length)).tolist() == [0.75]
    with pytest.raises(InputError, match=r"^reward\.function='Scorer' returned 'x', not a number"):
        score(Scorer())
    with pytest.raises(
        InputError, match=r"^reward\.function='test_a_.*<lambda>' returned 0 values"
    ):
        score(lambda prompts, responses: [])
