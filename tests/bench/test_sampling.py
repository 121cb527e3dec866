"""Drawing measured at a small size: what each case asks for, and what its rows say."""

import dataclasses

import jax
import numpy as np
import pytest

from vbon_jax.bench import sampling
from vbon_jax.bench.models import block_products
from vbon_jax.bench.sampling import OURS, Drawn, Work
from vbon_jax.models import decoder
from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling.requests import adjacent

TINY = DecoderConfig(vocab_size=64, positions=64, layers=1, width=16, heads=2, mlp_width=32)
WORK = Work(rows=8, prompt=16, new=4, n=(16,), pages=1)
CASES = {
    "short", "policy", "naive", "one prompt", "prefill", "ending", "bon 16", "reward", "proposal",
}  # fmt: skip


def test_every_case_is_drawn():
    asked = []

    def engine(ids, new):
        asked.append((ids.shape, len(np.unique(ids, axis=0)), new))
        return ids.shape[0] * new

    model = LanguageModel(TINY, decoder.init(TINY, jax.random.key(0)), tokenizer=None)
    found = sampling.draws(model, WORK, 1, {"other": engine})
    ours = found[OURS]
    assert found.keys() == {OURS, "other"} and ours.keys() == CASES
    assert all(drawn.seconds > 0 for drawn in ours.values())
    answered = {case: drawn.prompts for case, drawn in ours.items()}
    assert answered == dict.fromkeys(("short", "policy", "prefill", "reward", "proposal"), 8) | {
        "naive": 2, "bon 16": 1, "one prompt": 1, "ending": 4,
    }  # fmt: skip
    tokens = {case: drawn.tokens for case, drawn in ours.items()}
    assert tokens.pop("prefill") == 8 and tokens.pop("bon 16") == 16 * 4
    assert 32 < tokens.pop("ending") < 4 * 32
    assert set(tokens.values()) == {8 * 4}  # no response ends early
    assert asked == 2 * [((8, 8), 8, 4), ((8, 16), 8, 4), ((8, 16), 1, 4)]


def test_naive_best_of_n_reads_each_prompt_anew():
    ids = np.arange(6).reshape(2, 3)
    shared, apart = (sampling.requests_of(ids, 4, share) for share in (True, False))
    assert adjacent(shared) == 4 and adjacent(apart) == 1
    assert {(r.prompt_id, r.sample) for r in shared} == {(r.prompt_id, r.sample) for r in apart}


def test_rows_say_what_each_ratio_is_of():
    case = Drawn(seconds=2.0, prompts=8, tokens=32)
    ours = dict.fromkeys(CASES, case) | {
        "naive": Drawn(2.5, 1, 32), "one prompt": Drawn(1.0, 1, 32), "bon 16": Drawn(3.0, 1, 64),
    }  # fmt: skip
    theirs = dict.fromkeys(sampling.COMMON, Drawn(8.0, 8, 32))
    rows = sampling.rows({OURS: ours, "other": theirs}, TINY, WORK, peak=1e6, copying=1e6)
    found = {(row.what, row.unit): (row.value, row.ratio) for row in rows}
    assert found["policy", "s a prompt"] == (0.25, None)
    assert found["BoN(8), naive", "s a prompt"] == (2.5, 10.0)
    assert found["BoN(16), shared prefix", "s a prompt"] == (3.0, 12.0)
    assert found["one prompt for all rows", "tokens/s"] == (32.0, 2.0)
    assert found["policy, other", "tokens/s"] == (4.0, 4.0)
    shapes = jax.eval_shape(lambda key: decoder.init(TINY, key), jax.random.key(0))
    kernels = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(shapes["blocks"])
        if "kernel" in str(path)
    )  # fmt: skip
    assert TINY.layers * block_products(TINY) == kernels
    head = 2 * TINY.width * TINY.vocab_size
    drawing = (32 + 8 * 7) * 2 * kernels + 32 * head  # a prompt's last token draws the first
    assert found["8-token prompts", "tokens/s"] == (16.0, pytest.approx(drawing / 2.0 / 1e6))
    reading = 4 * (kernels + head / 2) * WORK.new
    assert found["8-token prompts: weights read", "GB/s"] == pytest.approx(
        (reading / 2e9, reading / 2e6)
    )
    filling = 8 * (16 * 2 * kernels + head)
    assert found["prefill of a batch", "s"] == (2.0, pytest.approx(filling / 2e6))


def test_one_row_is_refused():
    with pytest.raises(ValueError, match="rows must be at least 2, got 1"):
        sampling.draws(None, dataclasses.replace(WORK, rows=1))
