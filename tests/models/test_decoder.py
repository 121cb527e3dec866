import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vbon_jax.models import cache, decoder, hf

SIZES = {
    "vocab_size": 37, "positions": 19, "layers": 3, "width": 24, "heads": 3, "mlp_width": 40
}  # fmt: skip
CONFIG = decoder.DecoderConfig(**SIZES)


@pytest.fixture(scope="module")
def params():
    # Ten times GPT-2's initial weights, so that attention is far from uniform.
    config = dataclasses.replace(CONFIG, initializer_range=0.2)
    return jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=1)
def log_probs(params, config, tokens_BxT, mask_BxT):
    hidden_BxTxD = decoder.hidden(params, config, tokens_BxT, mask_BxT)
    return jax.nn.log_softmax(decoder.logits(params, config, hidden_BxTxD))


def torch_log_probs(model, tokens_BxT, mask_BxT):
    mask = torch.tensor(mask_BxT).long()
    logits = model(
        input_ids=torch.tensor(tokens_BxT).long(),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu", "n_layer": 1}])
def test_log_probs_equal_those_of_torch(torch_lm, padded_batch, tmp_path, changes):
    model = torch_lm(**changes)
    model.save_pretrained(tmp_path)
    config, params = hf.load_decoder(tmp_path)
    tokens_BxT, mask_BxT = padded_batch
    expected = torch_log_probs(model, tokens_BxT, mask_BxT).detach().numpy()
    got = np.asarray(log_probs(params, config, tokens_BxT, mask_BxT))
    assert expected[mask_BxT].std() > 1  # the model is far from uniform
    np.testing.assert_allclose(got[mask_BxT], expected[mask_BxT], rtol=0, atol=1e-4)


def test_gradient_equals_that_of_torch_under_padding(torch_lm, padded_batch, tmp_path):
    model = torch_lm()
    model.save_pretrained(tmp_path)
    config, params = hf.load_decoder(tmp_path)
    tokens_BxT, mask_BxT = padded_batch
    targets_BxT = np.roll(tokens_BxT, -1, axis=1)
    weight_BxT = mask_BxT / mask_BxT.sum()

    def loss(params):
        logp_BxTxV = log_probs(params, config, tokens_BxT, mask_BxT)
        return -(
            jnp.take_along_axis(logp_BxTxV, targets_BxT[..., None], 2)[..., 0] * weight_BxT
        ).sum()

    logp = torch_log_probs(model, tokens_BxT, mask_BxT)
    picked = logp.gather(2, torch.tensor(targets_BxT).long()[..., None])[..., 0]
    (-(picked * torch.tensor(weight_BxT)).sum()).backward()

    got = jax.jit(jax.grad(loss))(params)
    attention = got["blocks"]["attention"]
    names = {
        "wte.weight": got["wte"],
        "wpe.weight": got["wpe"],
        "h.0.attn.c_attn.weight": np.stack([attention[x]["kernel"][0] for x in "qkv"], 1),
        "h.1.attn.c_proj.weight": attention["out"]["kernel"][1],
        "h.2.mlp.c_fc.bias": got["blocks"]["mlp"]["up"]["bias"][2],
        "ln_f.weight": got["ln_f"]["scale"],
    }
    for name, gradient in names.items():
        expected = model.transformer.get_parameter(name).grad.numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(
            gradient.reshape(expected.shape), expected, rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_what_fills_the_padding_changes_nothing(params, padded_batch):
    tokens_BxT, mask_BxT = padded_batch
    other_BxT = np.where(mask_BxT, tokens_BxT, 36)
    first = np.asarray(log_probs(params, CONFIG, tokens_BxT, mask_BxT))
    second = np.asarray(log_probs(params, CONFIG, other_BxT, mask_BxT))
    np.testing.assert_array_equal(first[mask_BxT], second[mask_BxT])
    assert np.abs(first - second)[~mask_BxT].max() > 0  # the padding itself did change


def test_a_row_of_padding_is_finite_and_so_is_its_gradient(params, padded_batch):
    tokens_BxT, mask_BxT = padded_batch
    mask_BxT = mask_BxT.copy()
    mask_BxT[0] = False

    def total(params):
        logp_BxTxV = log_probs(params, CONFIG, tokens_BxT, mask_BxT)
        return logp_BxTxV.sum(), logp_BxTxV

    gradient, logp_BxTxV = jax.jit(jax.grad(total, has_aux=True))(params)
    assert np.isfinite(logp_BxTxV).all()
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()


def test_no_token_sees_a_later_one(params):
    tokens_BxT = np.random.default_rng(0).integers(0, 37, (5, 11)).astype(np.int32)
    later_BxT = tokens_BxT.copy()
    later_BxT[:, 6:] = (later_BxT[:, 6:] + 1) % 37
    mask_BxT = np.ones_like(tokens_BxT, bool)
    first = np.asarray(log_probs(params, CONFIG, tokens_BxT, mask_BxT))
    second = np.asarray(log_probs(params, CONFIG, later_BxT, mask_BxT))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert (np.abs(first - second)[:, 6:].max(axis=(1, 2)) > 1e-3).all()


@pytest.mark.parametrize("batch", [4, 1])
def test_prefill_and_steps_equal_the_full_forward(params, batch):
    prompt_length, length = 5, 12
    rng = np.random.default_rng(1)
    tokens_BxT = rng.integers(0, 37, (batch, length)).astype(np.int32)
    starts_B = np.array([0, 3, 4, 1])[:batch]  # unequal prompts, padded on the left
    mask_BxT = np.arange(length) >= starts_B[:, None]
    expected_BxTxD = decoder.hidden(params, CONFIG, tokens_BxT, mask_BxT)

    prefill = jax.jit(decoder.prefill, static_argnums=1)
    step = jax.jit(lambda p, *args: decoder.step(p, CONFIG, *args), donate_argnums=3)
    # Two slots more than are ever written: what is empty must not be seen.
    kv = cache.init(CONFIG, batch, length + 2)
    hidden_BxPxD, kv = prefill(
        params, CONFIG, tokens_BxT[:, :prompt_length], mask_BxT[:, :prompt_length], kv
    )
    prompt_mask = mask_BxT[:, :prompt_length]
    np.testing.assert_allclose(
        hidden_BxPxD[prompt_mask], expected_BxTxD[:, :prompt_length][prompt_mask], atol=1e-5
    )
    for t in range(prompt_length, length):
        assert int(kv.index) == t
        hidden_BxD, kv = step(params, tokens_BxT[:, t], t - starts_B, kv)
        np.testing.assert_allclose(hidden_BxD, expected_BxTxD[:, t], atol=1e-5)
    np.testing.assert_array_equal(kv.mask_BxS[:, :length], mask_BxT)
    assert not kv.mask_BxS[:, length:].any()
    assert step._cache_size() == 1  # one compile for all slots


def test_prefill_forgets_what_the_cache_held(params):
    tokens_BxP = np.array([[5, 6, 7]], np.int32)
    mask_BxP = np.ones_like(tokens_BxP, bool)
    used = cache.init(CONFIG, 1, 5)
    used = dataclasses.replace(
        used,
        k=tuple(jnp.full_like(k, 9.0) for k in used.k),
        mask_BxS=jnp.ones_like(used.mask_BxS),
        index=jnp.int32(5),
    )
    _, fresh = decoder.prefill(params, CONFIG, tokens_BxP, mask_BxP, cache.init(CONFIG, 1, 5))
    _, again = decoder.prefill(params, CONFIG, tokens_BxP, mask_BxP, used)
    position_B = token_B = jnp.array([3])
    expected, _ = decoder.step(params, CONFIG, token_B, position_B, fresh)
    got, _ = decoder.step(params, CONFIG, token_B, position_B, again)
    np.testing.assert_array_equal(got, expected)


def test_prompts_longer_than_the_cache_are_refused(params):
    tokens_BxP = jnp.zeros((1, 6), jnp.int32)
    with pytest.raises(ValueError, match=r"6 columns and the cache 5 slots"):
        decoder.prefill(
            params, CONFIG, tokens_BxP, jnp.ones((1, 6), bool), cache.init(CONFIG, 1, 5)
        )


def test_ids_out_of_range_give_nan_not_the_nearest_row(params):
    mask_BxT = np.ones((2, 20), bool)
    mask_BxT[1, :1] = False  # 19 tokens fit in 19 positions, 20 do not
    got = np.asarray(decoder.hidden(params, CONFIG, np.ones((2, 20), np.int32), mask_BxT))
    assert np.isnan(got[0, 19]).all()
    assert np.isfinite(got[1]).all()
    bad_BxT = np.array([[1, 37], [1, 36]], np.int32)
    got = np.asarray(decoder.hidden(params, CONFIG, bad_BxT, np.ones((2, 2), bool)))
    assert np.isnan(got[0, 1]).all() and np.isfinite(got[1]).all()


def test_a_step_past_the_end_of_the_cache_gives_nan(params):
    kv = cache.init(CONFIG, 2, 1)
    tokens_B = jnp.array([3, 4])
    first, kv = decoder.step(params, CONFIG, tokens_B, jnp.array([0, 0]), kv)
    second, _ = decoder.step(params, CONFIG, tokens_B, jnp.array([1, 1]), kv)
    assert np.isfinite(first).all()
    assert np.isnan(second).all()


def test_bfloat16_compute_is_near_float32(params, padded_batch):
    tokens_BxT, mask_BxT = padded_batch
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    hidden_BxTxD = decoder.hidden(params, config, tokens_BxT, mask_BxT)
    logits_BxTxV = decoder.logits(params, config, hidden_BxTxD)
    assert hidden_BxTxD.dtype == jnp.bfloat16
    assert logits_BxTxV.dtype == jnp.float32
    assert cache.init(config, 1, 2).k[0].dtype == jnp.bfloat16
    expected = log_probs(params, CONFIG, tokens_BxT, mask_BxT)
    got = jax.nn.log_softmax(logits_BxTxV)
    error = np.abs(np.asarray(got - expected))[mask_BxT]
    assert 0 < error.max() < 0.3


def test_initial_parameters_follow_gpt2():
    config = decoder.DecoderConfig(
        vocab_size=50, positions=30, layers=2, width=64, heads=4, mlp_width=256
    )
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(1))
    blocks = params["blocks"]
    shapes = jax.tree.map(jnp.shape, params)
    attention = shapes["blocks"]["attention"]
    for name in "qkv":
        assert attention[name] == {"kernel": (2, 64, 4, 16), "bias": (2, 4, 16)}
    assert attention["out"] == {"kernel": (2, 4, 16, 64), "bias": (2, 64)}
    assert shapes["blocks"]["mlp"]["up"] == {"kernel": (2, 64, 256), "bias": (2, 256)}
    assert shapes["blocks"]["mlp"]["down"] == {"kernel": (2, 256, 64), "bias": (2, 64)}
    assert (
        shapes["blocks"]["ln_1"] == shapes["blocks"]["ln_2"] == {"scale": (2, 64), "bias": (2, 64)}
    )
    assert (shapes["wte"], shapes["wpe"]) == ((50, 64), (30, 64))
    for kernel, stddev in (
        (params["wte"], 0.02),
        *((blocks["attention"][name]["kernel"], 0.02) for name in "qkv"),
        (blocks["mlp"]["up"]["kernel"], 0.02),
        (blocks["attention"]["out"]["kernel"], 0.01),  # 0.02 / sqrt(2 * 2 layers)
        (blocks["mlp"]["down"]["kernel"], 0.01),
    ):
        assert float(kernel.std()) == pytest.approx(stddev, rel=0.05)
    kernel = blocks["mlp"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])
    q, k = (blocks["attention"][name]["kernel"] for name in "qk")
    assert not np.array_equal(q, k)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_the_tree_follows_the_config():
    """Grouped keys, untied head, RMS norms on both sides, a gate, and no bias anywhere."""
    config = decoder.DecoderConfig(
        vocab_size=50, positions=30, layers=2, width=12, heads=4, kv_heads=2, head_width=6,
        mlp_width=7, norm="rms", norm_offset=True, place="sandwich", rotary=decoder.Rotary(),
        gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True, tied=False,
    )  # fmt: skip
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(1))
    norm = {"scale": (2, 12)}
    assert jax.tree.map(jnp.shape, params) == {
        "wte": (50, 12),
        "head": (50, 12),
        "ln_f": {"scale": (12,)},
        "blocks": {
            "ln_1": norm, "ln_2": norm, "post_attention": norm, "post_mlp": norm,
            "attention": {
                "q": {"kernel": (2, 12, 4, 6)}, "k": {"kernel": (2, 12, 2, 6)},
                "v": {"kernel": (2, 12, 2, 6)}, "out": {"kernel": (2, 4, 6, 12)},
                "q_norm": {"scale": (2, 6)}, "k_norm": {"scale": (2, 6)},
            },
            "mlp": {
                "up": {"kernel": (2, 12, 7)}, "gate": {"kernel": (2, 12, 7)},
                "down": {"kernel": (2, 7, 12)},
            },
        },
    }  # fmt: skip
    # The identity: an offset norm's factor is 1 + scale.
    assert not params["blocks"]["ln_1"]["scale"].any() and not params["ln_f"]["scale"].any()
    assert not np.array_equal(params["head"], params["wte"])


def test_what_is_recomputed_changes_no_gradient(params, padded_batch):
    tokens_BxT, mask_BxT = padded_batch

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, config):
        return (decoder.hidden(params, config, tokens_BxT, mask_BxT)[mask_BxT] ** 3).sum()

    expected = gradient(params, dataclasses.replace(CONFIG, remat="none"))
    for remat in ("dots", "full"):
        got = gradient(params, dataclasses.replace(CONFIG, remat=remat))
        for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-4)


def test_layers_in_segments_of_their_own_give_the_same(params, padded_batch):
    tokens_BxT, mask_BxT = padded_batch
    apart = decoder.unstacked(params)
    assert len(apart["blocks"]) == 3 and apart["wte"] is params["wte"]
    got = np.asarray(log_probs(apart, CONFIG, tokens_BxT, mask_BxT))
    expected = np.asarray(log_probs(params, CONFIG, tokens_BxT, mask_BxT))
    np.testing.assert_allclose(got[mask_BxT], expected[mask_BxT], rtol=0, atol=1e-5)
    again = decoder.unstacked(apart)
    jax.tree.map(np.testing.assert_array_equal, again, apart)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 25, "width is 25: give a multiple of heads, 3"),
        ("layers", 0, "layers is 0: give an integer of at least 1"),
        ("vocab_size", 3.0, "vocab_size is 3.0"),
        ("norm_eps", 0.0, "norm_eps is 0.0: give a positive number"),
        ("initializer_range", float("nan"), "initializer_range is nan"),
        ("activation", "swish", "activation is 'swish': give one of"),
        ("compute_dtype", "float16", "compute_dtype is 'float16': give one of"),
        ("kv_heads", 2, "kv_heads is 2: give a divisor of heads, 3"),
        ("head_width", -1, "head_width is -1: give an integer of at least 1"),
        ("window", 0, "window is 0: give None or at least 1"),
        ("windowed", (True, False), "windowed has 2 entries: give one a layer, 3"),
        ("query_scale", -1.0, "query_scale is -1.0: give a positive number"),
        ("attention_cap", 0, "attention_cap is 0: give a positive number"),
        ("logit_cap", float("inf"), "logit_cap is inf: give a positive number"),
        ("norm", "batch", "norm is 'batch': give one of"),
        ("place", "post", "place is 'post': give one of"),
        ("remat", "some", "remat is 'some': give one of"),
    ],
)
def test_bad_configs_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        decoder.DecoderConfig(**SIZES | {field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "yarn"}, "rotary scaling is 'yarn': give none, linear or llama3"),
        ({"theta": 0.0}, "theta and factor must be positive"),
        ({"factor": -1.0}, "theta and factor must be positive"),
        ({"fraction": 1.5}, r"fraction in \(0, 1\]"),
    ],
)
def test_bad_rotary_embeddings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder.Rotary(**changes)
