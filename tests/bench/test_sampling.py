from vbon_jax.bench import sampling
from vbon_jax.models.decoder import DecoderConfig

TINY = DecoderConfig(vocab_size=64, positions=64, layers=1, width=16, heads=2, mlp_width=32)


def test_every_case_is_measured(capsys, monkeypatch):
    found = sampling.rates(TINY, rows=4, prompt=16, new_tokens=8, pages=1, repeats=1)
    assert tuple(found) == sampling.CASES and all(rate > 0 for rate in found.values())
    monkeypatch.setattr(sampling, "rates", lambda *_, **__: dict.fromkeys(sampling.CASES, 200.0))
    sampling.main(["--model=gpt2", "--rows=4"])
    assert capsys.readouterr().out.count("200") == 4
