"""Policies that share their reference's weights: a GPT-2, and a Gemma 3, whose layers differ."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vbon_jax.models import cache, decoder, trainable
from vbon_jax.models.trainable import Trainable

ALPHA = 1.5
GPT2 = decoder.DecoderConfig(
    vocab_size=23, positions=16, layers=3, width=12, heads=3, mlp_width=20, initializer_range=0.2,
    lora_alpha=ALPHA,
)  # fmt: skip
# Windowed and whole layers, with rotary bases of their own: a block that runs as that of another
# layer gives another result, and the upper ones are not those that a count from 0 would name.
GEMMA = decoder.DecoderConfig(
    vocab_size=23, positions=16, layers=4, width=12, heads=4, kv_heads=2, head_width=6,
    mlp_width=20, norm="rms", norm_offset=True, place="sandwich",
    rotary=decoder.Rotary(theta=5000.0), rotary_window=decoder.Rotary(theta=20.0), window=3,
    windowed=(True, True, False, True), activation="gelu_pytorch_tanh", gated=True,
    qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True, embed_scale=12**0.5,
    initializer_range=0.2, lora_alpha=ALPHA,
)  # fmt: skip
CONFIGS = {"gpt2": GPT2, "gemma": GEMMA}
TOKENS = np.random.default_rng(3).integers(0, 23, (3, 10)).astype(np.int32)
MASK = np.ones((3, 10), bool)
MASK[1, :4] = MASK[2, :1] = False
PLAIN = ("q", "k", "v", "out", "up", "down")
LORA = Trainable(rank=3, targets=PLAIN)
KEY = jax.random.key(5)

hidden = jax.jit(decoder.hidden, static_argnums=1)
prefill = jax.jit(decoder.prefill, static_argnums=1)
step = jax.jit(decoder.step, static_argnums=1)


def noisy(tree, seed, size=0.3):
    """The tree with noise on every leaf: as after training, and no unit scale or zero bias left."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype), tree)


@functools.cache
def reference(name):
    return noisy(jax.jit(functools.partial(decoder.init, CONFIGS[name]))(jax.random.key(0)), 5)


def policy(name, what, dtype="float32", move=0.0):
    """(config, base, own): the reference as it is kept, what is trained, moved from its start."""
    config = CONFIGS[name]
    base = trainable.divide(reference(name), what, config.layers)
    own = trainable.start(base, what, jax.random.key(1), dtype)
    return config, base, noisy(own, 2, move) if move else own


def targets(name):
    return (*PLAIN, "gate") if CONFIGS[name].gated else PLAIN


def apart(first, second):
    return np.abs(np.asarray(first) - np.asarray(second))[MASK].max()


def cached(params, config, prompt):
    """Hidden states of all tokens, the first `prompt` by prefill and the others by steps."""
    slots = cache.init(config, len(TOKENS), TOKENS.shape[1])
    first, slots = prefill(params, config, TOKENS[:, :prompt], MASK[:, :prompt], slots)
    columns = [first]
    for t in range(prompt, TOKENS.shape[1]):
        new, slots = step(params, config, TOKENS[:, t], MASK[:, :t].sum(1), slots)
        columns.append(new[:, None])
    return np.concatenate(columns, axis=1)


CASES = [
    ("gpt2", Trainable(layers=1)),
    ("gpt2", LORA),
    ("gemma", Trainable()),
    ("gemma", Trainable(layers=2)),
    ("gemma", Trainable(rank=2, targets=(*PLAIN, "gate"))),
]


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_policy_starts_as_its_reference(name, what):
    config, base, own = policy(name, what)
    joined = trainable.join(base, own)
    # The numbers are the same ones; compiled with adapters they are rounded in another order.
    jax.tree.map(
        np.testing.assert_array_equal, trainable.merged(joined, ALPHA), dict(reference(name))
    )
    expected = hidden(reference(name), config, TOKENS, MASK)
    assert apart(hidden(joined, config, TOKENS, MASK), expected) < 1e-5
    assert apart(cached(joined, config, 6), expected) < 2e-5


@pytest.mark.parametrize(("name", "what"), CASES)
def test_a_trained_policy_runs_alike_whole_cached_and_merged(name, what):
    config, base, own = policy(name, what, move=0.2)
    joined = trainable.join(base, own)
    whole = hidden(joined, config, TOKENS, MASK)
    assert apart(whole, hidden(reference(name), config, TOKENS, MASK)) > 0.1
    assert apart(cached(joined, config, 6), whole) < 2e-5
    merged = trainable.merged(joined, ALPHA)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, reference(name))
    assert apart(hidden(merged, config, TOKENS, MASK), whole) < 1e-5


# Upper layers


@pytest.mark.parametrize(("name", "layers"), [("gpt2", 1), ("gemma", 2)])
def test_the_top_on_the_trunk_is_the_undivided_model(name, layers):
    config, base, own = policy(name, Trainable(layers=layers), move=0.2)
    cut = config.layers - layers
    changed = reference(name) | {"ln_f": own["ln_f"]}
    changed["blocks"] = jax.tree.map(
        lambda x, new: jnp.concatenate([x[:cut], new]), changed["blocks"], own["blocks"]
    )
    weight = jax.random.normal(jax.random.key(9), (3, 10, config.width)) * MASK[..., None]

    @jax.jit
    def by_top(own, base):
        below = decoder.trunk(base, config, TOKENS, MASK)
        out = decoder.top(trainable.join(base, own), config, below, MASK)
        return (out * weight).sum(), out

    @jax.jit
    def by_hidden(params):
        out = decoder.hidden(params, config, TOKENS, MASK)
        return (out * weight).sum(), out

    (_, got), gradient = jax.value_and_grad(by_top, has_aux=True)(own, base)
    (_, expected), whole = jax.value_and_grad(by_hidden, has_aux=True)(changed)
    assert apart(got, expected) < 1e-5
    upper = {
        "blocks": jax.tree.map(lambda x: x[cut:], whole["blocks"]), "ln_f": whole["ln_f"]
    }  # fmt: skip
    assert jax.tree.structure(gradient) == jax.tree.structure(upper)
    for path, expected in flatten_dict(upper, sep="/").items():
        got = flatten_dict(gradient, sep="/")[path]
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
        assert np.abs(expected).max() > 1e-2 or path.endswith("k/bias")
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=path)


def test_segments_of_any_number_and_depth_are_the_undivided_model():
    whole = reference("gemma")
    parts = tuple(
        jax.tree.map(lambda x, p=part: x[p], whole["blocks"])
        for part in (slice(0, 2), slice(2, 3), slice(3, 4))
    )
    got = hidden({**whole, "blocks": parts}, GEMMA, TOKENS, MASK)
    assert apart(got, hidden(whole, GEMMA, TOKENS, MASK)) < 1e-5


def test_the_trunk_is_shared_and_the_top_is_copied():
    _, base, own = policy("gpt2", Trainable(layers=1))
    joined = trainable.join(base, own)
    lower, upper = base["blocks"]
    assert jax.tree.leaves(lower)[0].shape[0] == 2 and jax.tree.leaves(upper)[0].shape[0] == 1
    shared = [(lower, joined["blocks"][0])] + [(base[x], joined[x]) for x in ("wte", "wpe")]
    for first, second in shared:
        assert all(map(same_buffer, jax.tree.leaves(first), jax.tree.leaves(second)))
    copied = [(upper, joined["blocks"][1]), (base["ln_f"], joined["ln_f"])]
    for first, second in copied:
        assert not any(map(same_buffer, jax.tree.leaves(first), jax.tree.leaves(second)))
    assert own.keys() == {"blocks", "ln_f"}
    assert trainable.divided(base) and trainable.divided(joined)
    assert not trainable.trains_head(own)


def same_buffer(first, second):
    return first.unsafe_buffer_pointer() == second.unsafe_buffer_pointer()


def test_a_whole_model_is_copied():
    """Its buffers are donated to each step, and those of the reference must outlive them."""
    _, base, own = policy("gpt2", Trainable())
    assert base is reference("gpt2") and not trainable.divided(base)
    assert trainable.join(base, own) is own and trainable.trains_head(own)
    assert Trainable().whole and not Trainable(layers=1).whole and not LORA.whole
    for first, second in zip(jax.tree.leaves(base), jax.tree.leaves(own), strict=True):
        assert not same_buffer(first, second)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("layers", [0, 3, 4, -2])
def test_as_many_layers_as_there_are_not_are_refused(layers):
    with pytest.raises(
        ValueError, match=f"num_layers_unfrozen is {layers} and the model has 3 layers: give 1 to 2"
    ):
        trainable.divide(reference("gpt2"), Trainable(layers=layers), 3)


# Adapters


@pytest.mark.parametrize(
    ("name", "target"),
    [("gpt2", "k"), ("gpt2", "out"), *(("gemma", target) for target in (*PLAIN, "gate"))],
)
def test_each_adapter_equals_its_merged_weight(name, target):
    """Two input axes (out), grouped keys and values, both sides of a gated MLP."""
    config, base, own = policy(name, Trainable(rank=2, targets=(target,)), move=0.3)
    joined = trainable.join(base, own)
    got = hidden(joined, config, TOKENS, MASK)
    merged = trainable.merged(joined, ALPHA)
    assert apart(got, hidden(merged, config, TOKENS, MASK)) < 1e-5
    assert apart(got, hidden(base, config, TOKENS, MASK)) > 0.02
    before, after = (flatten_dict(x, sep="/") for x in (base, merged))
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert {path.split("/")[-2:] == [target, "kernel"] for path in changed} == {True}


def test_the_scaling_by_hand():
    """W x + (alpha / r) B A x, with alpha 6 and r 3: twice the product, in both places."""
    config, base, own = policy("gpt2", Trainable(rank=3, targets=("out",)), move=0.3)
    out = own["blocks"]["attention"]["out"]
    assert jax.tree.map(jnp.shape, out) == {"lora_a": (3, 12, 3), "lora_b": (3, 3, 12)}
    kernel = np.asarray(base["blocks"]["attention"]["out"]["kernel"], np.float64)
    expected = kernel.copy()
    for layer in range(3):
        for head in range(3):
            a = np.asarray(out["lora_a"][layer, 4 * head : 4 * head + 4], np.float64)
            expected[layer, head] += 2.0 * a @ np.asarray(out["lora_b"][layer], np.float64)
    joined = trainable.join(base, own)
    merged = trainable.merged(joined, 6.0)
    got = merged["blocks"]["attention"]["out"]["kernel"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    by_hand = jax.tree.map(jnp.array, reference("gpt2"))
    by_hand["blocks"]["attention"]["out"]["kernel"] = jnp.array(expected, jnp.float32)
    got = hidden(joined, dataclasses.replace(config, lora_alpha=6.0), TOKENS, MASK)
    assert apart(got, hidden(by_hand, config, TOKENS, MASK)) < 1e-5


def test_adapters_start_as_those_of_peft_do():
    base = {"blocks": {"attention": {"q": {"kernel": jnp.zeros((2, 400, 3, 5))}}}}
    own = trainable.start(base, Trainable(rank=7, targets=("q",)), KEY)
    q = own["blocks"]["attention"]["q"]
    assert jax.tree.map(jnp.shape, own) == {
        "blocks": {"attention": {"q": {"lora_a": (2, 400, 7), "lora_b": (2, 7, 15)}}}
    }
    assert not q["lora_b"].any()
    assert 0.0499 < np.abs(q["lora_a"]).max() < 0.05  # 1 / sqrt(400)
    assert q["lora_a"].std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert not np.array_equal(q["lora_a"][0], q["lora_a"][1])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_gradients_reach_adapters_alone_and_every_one(name):
    config, base, own = policy(name, Trainable(rank=2, targets=targets(name)), move=0.1)
    assert not trainable.trains_head(own)
    joined = trainable.join(base, own)
    names = {path.split("/")[-1] for path in flatten_dict(own, sep="/")}
    assert names == {"lora_a", "lora_b"}
    frozen = [path for path in flatten_dict(joined, sep="/") if path.split("/")[-1] not in names]
    assert sorted(frozen) == sorted(flatten_dict(base, sep="/"))
    for path in frozen:
        assert flatten_dict(joined, sep="/")[path] is flatten_dict(base, sep="/")[path]

    @jax.jit
    def loss(own, base):
        return (decoder.hidden(trainable.join(base, own), config, TOKENS, MASK)[MASK] ** 3).sum()

    gradient = jax.grad(loss)(own, base)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        assert (np.abs(leaf).max(axis=(1, 2)) > 1e-3).all(), path  # in each layer


def test_b_learns_first():
    """With B = 0 the gradient of A is 0 and that of B is not."""
    config, base, own = policy("gpt2", Trainable(rank=2, targets=("up",)))

    @jax.jit
    def loss(own, base):
        return (decoder.hidden(trainable.join(base, own), config, TOKENS, MASK)[MASK] ** 3).sum()

    up = jax.grad(loss)(own, base)["blocks"]["mlp"]["up"]
    assert not up["lora_a"].any() and np.abs(up["lora_b"]).max() > 1e-3


@pytest.mark.parametrize(
    ("target", "known"), [("gate", "down, k, out, q, up, v"), ("qkv", "down, k, out, q, up, v")]
)
def test_a_target_the_model_has_not_is_refused(target, known):
    with pytest.raises(ValueError, match=f"LoRA target '{target}': the model has {known}$"):
        policy("gpt2", Trainable(rank=2, targets=("q", target)))


# Dtypes


@pytest.mark.parametrize("what", [Trainable(), Trainable(layers=1), LORA])
def test_what_is_trained_has_a_dtype_of_its_own(what):
    """A bfloat16 reference under float32 weights that are trained, and the other way round."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), reference("gpt2"))
    for base, dtype in ((low, "float32"), (reference("gpt2"), "bfloat16")):
        base = trainable.divide(base, what, 3)
        own = trainable.start(base, what, KEY, dtype)
        assert {x.dtype.name for x in jax.tree.leaves(own)} == {dtype}
        joined = trainable.join(base, own)
        assert joined["wte"].dtype == (own if what.whole else base)["wte"].dtype
        got = hidden(joined, GPT2, TOKENS, MASK)
        assert got.dtype == jnp.float32  # that of the arithmetic, not of the weights
        assert apart(got, hidden(low, GPT2, TOKENS, MASK)) < (0.2 if dtype == "bfloat16" else 1e-4)


def test_adapters_are_added_to_bfloat16_weights_in_float32():
    """The product is (1 + 2^-7)^2, whose last bit bfloat16 would lose, and nothing else is left."""
    kernel = jnp.full((1, 1, 1, 1), -1.0 - 2.0**-6, jnp.bfloat16)
    factor = jnp.full((1, 1, 1), 1.0 + 2.0**-7, jnp.bfloat16)
    q = {"kernel": kernel, "lora_a": factor, "lora_b": factor}
    got = trainable.merged({"blocks": {"attention": {"q": q}}})["blocks"]["attention"]["q"]
    assert got.keys() == {"kernel"} and got["kernel"].dtype == jnp.bfloat16
    assert float(got["kernel"][0, 0, 0, 0]) == 2.0**-14


@pytest.mark.parametrize("what", [LORA, Trainable(layers=1)])
def test_merging_keeps_float32_steps_over_a_bfloat16_reference(what):
    """A step of 2^-12 of the weights: bfloat16, of 8 bits, would round all of it away."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), reference("gpt2"))
    base = trainable.divide(low, what, 3)
    own = trainable.start(base, what, KEY)
    if what.rank:
        own = jax.tree.map(lambda x: x + 2.0**-10, own)
    else:
        own = jax.tree.map(lambda x: x * (1 + 2.0**-12), own)
    merged = trainable.merged(trainable.join(base, own), ALPHA)
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    exact = trainable.merged(trainable.join(float32, own), ALPHA)
    jax.tree.map(np.testing.assert_array_equal, merged, dict(exact))
    q = merged["blocks"]["attention"]["q"]["kernel"]
    assert q.dtype == jnp.float32
    kernel = low["blocks"]["attention"]["q"]["kernel"]
    step = np.abs(q - kernel.astype(jnp.float32))[-1]
    assert 0 < step.max() < 0.01 and np.mean(q.astype(jnp.bfloat16) == kernel) > 0.5
    assert trainable.merge_loss(trainable.join(base, own), ALPHA) == 0


def test_what_merging_in_bfloat16_loses_by_hand():
    """1 + 2^-6 is kept, and of 1 + 2^-9 all of the 2^-9: 2^-9 of sqrt(2^-12 + 2^-18) is lost."""
    kernel = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    a = jnp.ones((1, 1, 1), jnp.bfloat16)
    b = jnp.array([[[2.0**-6, 2.0**-9]]], jnp.bfloat16)
    q = {"kernel": kernel, "lora_a": a, "lora_b": b}
    tree = {"blocks": {"attention": {"q": q}}}
    assert trainable.merge_loss(tree) == pytest.approx(2.0**-9 / (2.0**-12 + 2.0**-18) ** 0.5)
    still = {"blocks": {"attention": {"q": q | {"lora_b": 0 * b}}}}
    assert trainable.merge_loss(still) == 0
    assert trainable.has_adapters(tree) and not trainable.has_adapters(trainable.merged(tree))
