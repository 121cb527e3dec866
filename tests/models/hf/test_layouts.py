"""Every layout against torch's and transformers' own modules: equal products of equal inputs."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.pytorch_utils import Conv1D

from vbon_jax.models.hf import layouts

D, H, K, F = 6, 3, 4, 10  # width, heads, head width (H * K is not D), MLP width
X_BxD = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)


def numpy(tensor):
    return tensor.detach().numpy()


def leaves_of(layout, array, shapes):
    """What the layout reads, once the trip back is seen to give the file's tensor again."""
    array = numpy(array)
    assert layout.shape(shapes) == array.shape
    leaves = layout.read(array, shapes)
    assert [leaf.shape for leaf in leaves] == list(shapes)
    np.testing.assert_array_equal(layout.write(leaves), array)
    return leaves


@pytest.mark.parametrize("out", [(F,), (H, K)])
def test_linear(out):
    linear = torch.nn.Linear(D, int(np.prod(out)))
    (kernel,) = leaves_of(layouts.LINEAR, linear.weight, [(D, *out)])
    (bias,) = leaves_of(layouts.FLAT, linear.bias, [out])
    got = np.tensordot(X_BxD, kernel, 1) + bias
    np.testing.assert_allclose(got.reshape(5, -1), numpy(linear(torch.tensor(X_BxD))), atol=1e-6)


def test_linear_out_of_heads():
    linear = torch.nn.Linear(H * K, D, bias=False)
    (kernel_HxKxD,) = leaves_of(layouts.LINEAR_HEADS, linear.weight, [(H, K, D)])
    x_BxHxK = np.random.default_rng(1).normal(size=(5, H, K)).astype(np.float32)
    expected = numpy(linear(torch.tensor(x_BxHxK).flatten(1)))
    np.testing.assert_allclose(np.tensordot(x_BxHxK, kernel_HxKxD, 2), expected, atol=1e-6)


def test_conv1d():
    conv = Conv1D(F, D)
    (kernel,) = leaves_of(layouts.CONV1D, conv.weight, [(D, F)])
    (bias,) = leaves_of(layouts.AS_IS, conv.bias, [(F,)])
    np.testing.assert_allclose(X_BxD @ kernel + bias, numpy(conv(torch.tensor(X_BxD))), atol=1e-6)


def test_conv1d_out_of_heads():
    conv = Conv1D(D, H * K)
    (kernel_HxKxD,) = leaves_of(layouts.CONV1D_HEADS, conv.weight, [(H, K, D)])
    x_BxHxK = np.random.default_rng(1).normal(size=(5, H, K)).astype(np.float32)
    expected = numpy(conv(torch.tensor(x_BxHxK).flatten(1)))
    np.testing.assert_allclose(np.tensordot(x_BxHxK, kernel_HxKxD, 2), expected, atol=1e-6)


class Caught(Exception):
    """Carries q, k and v, each [B, H, T, K], out of transformers' attention."""


def attended(attention, monkeypatch, module, **arguments):
    """The q, k and v that a module of transformers computes and hands to its attention."""

    def catch(self, q, k, v, *args, **kwargs):
        raise Caught(q, k, v)

    monkeypatch.setattr(module, "eager_attention_forward", catch)
    with pytest.raises(Caught) as caught:
        attention(torch.tensor(X_BxD_12)[None], attention_mask=None, **arguments)
    return [numpy(x)[0] for x in caught.value.args]


X_BxD_12 = np.random.default_rng(2).normal(size=(5, H * K)).astype(np.float32)
QKV = [(H * K, H, K)] * 3


def assert_products_equal(kernels, biases, expected_HxBxK):
    for kernel, bias, expected in zip(kernels, biases, expected_HxBxK, strict=True):
        got_BxHxK = np.tensordot(X_BxD_12, kernel, 1) + bias
        np.testing.assert_allclose(got_BxHxK.swapaxes(0, 1), expected, atol=1e-5)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.eval()


def test_queries_keys_and_values_of_gpt2(monkeypatch):
    config = transformers.GPT2Config(n_embd=H * K, n_head=H, attn_implementation="eager")
    attention = randomised(GPT2Attention(config, layer_idx=0))
    kernels = leaves_of(layouts.CONV1D_QKV, attention.c_attn.weight, QKV)
    biases = leaves_of(layouts.FLAT_QKV, attention.c_attn.bias, [(H, K)] * 3)
    module = transformers.models.gpt2.modeling_gpt2
    assert_products_equal(kernels, biases, attended(attention, monkeypatch, module))


def test_queries_keys_and_values_of_gpt_neox(monkeypatch):
    config = transformers.GPTNeoXConfig(
        hidden_size=H * K, num_attention_heads=H, attn_implementation="eager"
    )
    attention = randomised(GPTNeoXAttention(config, layer_idx=0))
    kernels = leaves_of(layouts.LINEAR_HEAD_QKV, attention.query_key_value.weight, QKV)
    biases = leaves_of(layouts.FLAT_HEAD_QKV, attention.query_key_value.bias, [(H, K)] * 3)
    module = transformers.models.gpt_neox.modeling_gpt_neox
    turned_by_nothing = (torch.ones(1, 5, K), torch.zeros(1, 5, K))  # cos, sin
    expected = attended(attention, monkeypatch, module, position_embeddings=turned_by_nothing)
    assert_products_equal(kernels, biases, expected)


def test_rows_are_rows():
    """Where a layout says so, slices of the file's first axis are slices of the leaf's."""
    array = np.arange(24.0).reshape(6, 4)
    for layout in (v for v in vars(layouts).values() if isinstance(v, layouts.Layout)):
        if layout.rows:
            (leaf,) = layout.read(array[2:5], [(3, 4)])
            np.testing.assert_array_equal(leaf, layout.read(array, [(6, 4)])[0][2:5])
    assert layouts.AS_IS.rows
