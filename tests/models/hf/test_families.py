"""Each family against transformers' own torch model, every parameter random, in odd shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from vbon_jax.models import cache, decoder, hf
from vbon_jax.models.hf import families

SIZES = {
    "vocab_size": 131, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 36, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GQA = {"num_key_value_heads": 2, "head_dim": 10}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
GPT2 = {
    "vocab_size": 131, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 40, "n_positions": 40,
    "layer_norm_epsilon": 3e-3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
}

# (model_type, what differs from the sizes above); a new family is a new line.
CASES = {
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5}),
    "gpt_neox sequential": (
        "gpt_neox",
        SIZES | {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True,
                 "attention_bias": False},
    ),
    "llama 3.1": ("llama", SIZES | GQA | {"rope_parameters": LLAMA3}),
    "llama 3.2": (
        "llama",
        SIZES | GQA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True,
                       "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", SIZES | GQA | {"sliding_window": 4}),
    "qwen2": ("qwen2", SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2 windowed": (
        "qwen2",
        SIZES | {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 3,
                 "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SIZES | GQA),
    "gemma2": (
        "gemma2",
        SIZES | GQA | {"sliding_window": 4, "query_pre_attn_scalar": 7, "attn_logit_softcapping":
                       5.0, "final_logit_softcapping": 3.0, "layer_types": ALTERNATE},
    ),
    "gemma3_text": (
        "gemma3_text",
        SIZES | GQA | {"sliding_window": 4, "query_pre_attn_scalar": 7, "layer_types": ALTERNATE,
                       "rope_parameters": TWO_BASES},
    ),
}  # fmt: skip


def torch_model(case, auto=AutoModelForCausalLM, **more):
    model_type, sizes = CASES[case]
    config = AutoConfig.for_model(model_type, **sizes, **more)
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # zero biases and unit scales would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def padded_rows():
    """No padding, left, right, both sides, one token; [5, 11]."""
    tokens = np.random.default_rng(3).integers(3, 131, (5, 11)).astype(np.int32)
    mask = np.ones((5, 11), bool)
    mask[1, :4] = mask[2, 6:] = mask[3, :2] = mask[3, 9:] = mask[4, :10] = False
    return np.where(mask, tokens, 0), mask


def torch_logits(model, tokens, mask):
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        return model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


@pytest.fixture(scope="module", params=list(CASES))
def loaded(request, tmp_path_factory):
    """(case, torch model, our config, our parameters), through a directory."""
    model = torch_model(request.param)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return request.param, model, *hf.load_decoder(directory)


def test_logits_equal_those_of_transformers(loaded):
    case, model, config, params = loaded
    tokens, mask = padded_rows()
    got = decoder.logits(params, config, decoder.hidden(params, config, tokens, mask))
    difference = np.abs(got - torch_logits(model, tokens, mask))[mask].max()
    print(f"| {case} | {difference:.1e} |")
    assert difference < 1e-4


def test_a_cached_step_equals_the_whole_forward(loaded):
    _, _, config, params = loaded
    tokens, mask = padded_rows()
    rows = [0, 1]  # padded on the left, if at all
    whole = decoder.hidden(params, config, tokens[rows], mask[rows])
    slots = cache.init(config, 2, 11)
    _, slots = decoder.prefill(params, config, tokens[rows, :6], mask[rows, :6], slots)
    step = jax.jit(decoder.step, static_argnums=1)
    for t in range(6, 11):
        position = jnp.sum(mask[rows, :t], axis=1)
        got, slots = step(params, config, tokens[rows, t], position, slots)
        np.testing.assert_allclose(got, whole[:, t], rtol=0, atol=2e-5)


def test_rows_on_a_shared_prompt_equal_their_whole_forward(loaded):
    """Two prompts side by side, three rows on one or the other, each at a slot of its own."""
    _, _, config, params = loaded
    tokens, mask = padded_rows()
    _, kept = decoder.prefill(
        params, config, tokens[:2, :6], mask[:2, :6], cache.init(config, 2, 6)
    )
    of = np.array([0, 1, 0])
    side_by_side = (
        tuple(x.swapaxes(0, 1).reshape(1, x.shape[1], 12, -1) for x in both)
        for both in (kept.k, kept.v)
    )
    prefix = cache.Prefix(
        *side_by_side, kept.mask_BxS[of], kept.position_BxS[of], jnp.array(of, jnp.int32)
    )
    after = np.random.default_rng(4).integers(3, 131, (3, 5)).astype(np.int32)
    seen = np.concatenate([mask[of, :6], np.ones((3, 5), bool)], axis=1)
    whole = decoder.hidden(params, config, np.concatenate([tokens[of, :6], after], axis=1), seen)
    own = cache.init(config, 3, 7)
    first = jnp.array([0, 2, 1])  # the slots before are those of another response, not attended to
    own = dataclasses.replace(own, index=first, k=tuple(x + 9.0 for x in own.k))
    step = jax.jit(decoder.step, static_argnums=1)
    for t in range(5):
        position = jnp.sum(seen[:, : 6 + t], axis=1)
        got, own = step(params, config, after[:, t], position, own, prefix)
        np.testing.assert_allclose(got, whole[:, 6 + t], rtol=0, atol=2e-5)
    assert own.index.tolist() == [5, 7, 6]


def test_rows_that_share_a_prompt_equal_each_run_alone_with_its_gradients(loaded):
    """Two prompts, one padded on the left, of two responses each, of which one ends early."""
    _, _, config, params = loaded
    tokens, mask = padded_rows()
    of = np.array([0, 0, 1, 1])
    after = np.random.default_rng(4).integers(3, 131, (4, 5)).astype(np.int32)
    tokens = np.concatenate([tokens[of, :6], after], axis=1)
    mask = np.concatenate([mask[of, :6], np.arange(5) < np.array([5, 2, 4, 5])[:, None]], axis=1)

    @functools.partial(jax.jit, static_argnums=1)
    def found(params, same):
        def total(params):
            hidden = decoder.hidden(params, config, tokens, mask, same)[:, 5:]
            hidden = jnp.where(mask[:, 5:, None], hidden, 0.0)
            return jnp.sum(jnp.sin(hidden)), hidden

        (_, hidden), grads = jax.value_and_grad(total, has_aux=True)(params)
        return hidden, grads

    got, expected = found(params, decoder.Adjacent(2, 6)), found(params, None)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=2e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    assert largest > 0.1
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


def test_another_token_in_place_equals_the_whole_forward_with_it(loaded):
    """Of the last 7 tokens; rows with padding on either side, and one that ends within them."""
    _, _, config, params = loaded
    tokens, mask = padded_rows()
    tokens, mask, last = tokens[:4], mask[:4], 7
    others = (tokens[:, -last:] + 5) % 131
    kept = cache.init(config, 4, 11 + last)
    _, kept = decoder.prefill(params, config, tokens, mask, kept)
    got = decoder.instead(params, config, others, kept)
    for t in range(11 - last, 11):
        here = mask[:, :t].any(axis=1)
        seen = (mask & (np.arange(11) < t)) | (np.arange(11) == t)
        with_it = np.where(np.arange(11) == t, others[:, [t - 11]], tokens)
        whole = decoder.hidden(params, config, with_it, seen)[:, t]
        np.testing.assert_allclose(got[here, t - 11], whole[here], rtol=0, atol=2e-5)


def test_bfloat16_stays_near(loaded):
    """Within 0.15 of the logits' own spread: bfloat16 has 8 bits, and these weights are wide."""
    _, model, config, params = loaded
    tokens, mask = padded_rows()
    low = dataclasses.replace(config, compute_dtype="bfloat16")
    got = decoder.logits(params, low, decoder.hidden(params, low, tokens, mask))
    assert got.dtype == jnp.float32
    expected = torch_logits(model, tokens, mask)
    assert np.abs(got - expected)[mask].mean() < 0.15 * expected[mask].std()


def test_an_exported_directory_gives_equal_log_probs_in_transformers(loaded, tmp_path):
    _, model, config, params = loaded
    model.save_pretrained(tmp_path / "base")
    _, _, raw = hf.read_config(tmp_path / "base")
    hf.save_decoder(tmp_path / "ours", config, params, ids=hf.TokenIds(1, 2, 0), like=raw)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(back) is type(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)
    assert back.generation_config.eos_token_id == 2


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "llama 3.1", "gemma3_text"])
@pytest.mark.parametrize("labels", [1, 3])
def test_scores_equal_those_of_transformers(case, labels, tmp_path):
    from vbon_jax.models import heads

    model = torch_model(case, AutoModelForSequenceClassification, num_labels=labels)
    model.save_pretrained(tmp_path)
    config, params, names = hf.load_classifier(tmp_path)
    assert len(names.names) == labels
    tokens, mask = padded_rows()
    tokens, mask = tokens[:3], mask[:3]
    hidden = decoder.hidden(params["decoder"], config, tokens, mask)
    got = heads.score(params["score"], hidden, mask)
    np.testing.assert_allclose(got, torch_logits(model, tokens, mask), rtol=0, atol=1e-4)


def test_every_family_is_tested():
    decoders = {name for name in families.MODEL_TYPES if families.family(name).causal}
    assert decoders == {model_type for model_type, _ in CASES.values()}


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama 3.1", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
         "rope_type is 'yarn'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("qwen3", {"hidden_act": "tanh"}, "activation is 'tanh'"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(case, change, message):
    model_type, sizes = CASES[case]
    with pytest.raises(ValueError, match=message):
        families.family(model_type).config(transformers.AutoConfig.for_model(
            model_type, **sizes | change))  # fmt: skip


def test_an_unknown_family_names_those_there_are():
    with pytest.raises(ValueError, match=r"model_type is 'bloom': supported are .*gpt2.*qwen3"):
        families.family("bloom")
