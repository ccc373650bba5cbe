"""Noise, logit processing against independent definitions, and the choice of a token."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppsd.errors import ConfigError, NonFiniteError, RequestError
from ppsd.speculation.sampling import Sampler, Stream, _generator, gumbel, uniform
from ppsd.types import SamplingParams
from tests.statistics import g_test, holm_rejections

VOCAB = 97
PROMPT = 5


def make_sampler(
    vocab: int = VOCAB, stop_ids: frozenset[int] = frozenset(), **params: object
) -> Sampler:
    return Sampler(SamplingParams(**params), PROMPT, stop_ids, vocab)


def tokens(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def random_row(seed: int, vocab: int = VOCAB, length: int = 30) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, vocab))
    return logits, torch.from_numpy(rng.integers(0, vocab, length))


# Noise


PINNED_GUMBEL = {
    (0, 0, Stream.TARGET): [5.3063821329366805, 0.5096775849731838, 1.0789625254569277],
    (2**63 - 1, 2**40, Stream.DRAFT): [5.480002071628529, 0.22883322882080442, -0.6887156929831058],
}


def test_noise_is_pinned():
    """A dependency must not change seeded output silently.

    The tolerance is for NumPy's log, whose last bit may differ between CPUs.
    """
    assert uniform(0, 0, Stream.TARGET) == 0.011546754286331562
    assert uniform(2**63 - 1, 2**40, Stream.RESIDUAL) == 0.5857658406893761
    for (seed, position, stream), expected in PINNED_GUMBEL.items():
        noise = gumbel(seed, position, 3, stream)
        assert noise.tolist() == pytest.approx(expected, rel=1e-14)


def test_drawing_never_reaches_the_words_of_stream_and_position():
    bits = _generator(3, 2**63, Stream.RESIDUAL).bit_generator
    bits.advance(2**128 - 1)
    assert bits.state["state"]["counter"].tolist() == [2**64 - 1, 2**64 - 1, 3, 2**63]


def test_same_key_same_bits_and_short_is_prefix_of_long():
    assert torch.equal(gumbel(7, 11, 500), gumbel(7, 11, 500))
    assert torch.equal(gumbel(7, 11, 500)[:123], gumbel(7, 11, 123))


def test_neighbouring_keys_are_uncorrelated():
    keys = [(s, p, t) for s in (0, 1, 2**63 - 1) for p in (0, 1, 2, 2**20) for t in Stream]
    noise = torch.stack([gumbel(s, p, 20_000, t) for s, p, t in keys])
    correlation = torch.corrcoef(noise) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    assert len(set(noise.flatten().tolist())) > 0.999 * noise.numel()


def test_uniform_across_positions_and_gumbel_within_one_are_well_distributed():
    uniforms = np.array([uniform(3, p, Stream.ACCEPT) for p in range(10_000)])
    cdf = np.exp(-np.exp(-gumbel(3, 5, 10_000).numpy()))
    lagged = 10 * (uniforms[:-1] * 10).astype(int) + (uniforms[1:] * 10).astype(int)
    p_values = {
        "uniform": g_test(np.histogram(uniforms, 50, (0, 1))[0], np.full(50, 0.02)),
        "gumbel": g_test(np.histogram(cdf, 50, (0, 1))[0], np.full(50, 0.02)),
        "successive positions": g_test(np.bincount(lagged, minlength=100), np.full(100, 0.01)),
    }
    assert not holm_rejections(p_values, 1e-4), p_values


def test_gumbel_stays_finite_when_an_exponential_is_zero(monkeypatch):
    class Zeros:
        def standard_exponential(self, size: int) -> np.ndarray:
            return np.zeros(size)

    monkeypatch.setattr("ppsd.speculation.sampling._generator", lambda *_: Zeros())
    sampler = make_sampler(vocab=3, temperature=1.0)
    assert sampler.choose(torch.tensor([-math.inf, 1.0, 1.0]), tokens()) == 1


# Processing against transformers


REFERENCES = {  # in the order of application
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
ALL = {"temperature": 1.6, "top_k": 20, "top_p": 0.9, "min_p": 0.04, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.7},
        {"temperature": 1.0, "repetition_penalty": 0.6},
        ALL,
    ],
    ids=str,
)
def test_process_agrees_with_transformers(params):
    sampler = make_sampler(**params)
    reference = LogitsProcessorList(
        make(params[name]) for name, make in REFERENCES.items() if name in params
    )
    for logits, history in map(random_row, range(20)):
        expected = reference(history[None], logits[None].clone())[0]
        actual = sampler.process(logits, history)
        torch.testing.assert_close(actual.softmax(0), expected.softmax(0), rtol=1e-12, atol=0)
        assert actual.max() == 0


@pytest.mark.parametrize(
    ("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-1.1, 0.4), (2.0, -2.0)]
)
def test_presence_and_frequency_count_output_tokens_only(presence, frequency):
    sampler = make_sampler(11, presence_penalty=presence, frequency_penalty=frequency)
    for logits, history in (random_row(seed, vocab=11) for seed in range(20)):
        expected = logits.tolist()
        for token in range(11):
            count = history.tolist()[PROMPT:].count(token)
            expected[token] -= frequency * count + (presence if count else 0)
        assert sampler.process(logits, history).tolist() == pytest.approx(expected, rel=1e-14)


def test_bias_comes_before_repetition_penalty_before_presence():
    sampler = make_sampler(
        2, logit_bias={0: 3.0}, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    processed = sampler.process(torch.tensor([-1.0, -1.0]), tokens(1, 1, 1, 1, 1, 0, 0))
    assert processed.tolist() == [(-1.0 + 3.0) / 2 - 0.5 - 2 * 0.25, -2.0]


def test_min_tokens_bans_stop_ids_until_enough_output_even_against_bias():
    sampler = make_sampler(4, frozenset({1, 3}), min_tokens=2, logit_bias={1: 100.0})
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])
    choices = [sampler.choose(logits, tokens(*[0] * (PROMPT + n))) for n in range(4)]
    assert choices == [2, 2, 1, 1]


# Truncation: ties and limits


def kept(logits: list[float], **params: object) -> list[int]:
    sampler = make_sampler(len(logits), temperature=1.0, **params)
    return sampler.process(torch.tensor(logits), tokens()).isfinite().nonzero().flatten().tolist()


def test_top_k_keeps_everything_equal_to_the_kth():
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], top_k=2) == [1, 2, 3]
    assert kept([1.0, 3.0, 2.0], top_k=50) == [0, 1, 2]
    assert kept([-math.inf, 3.0, -math.inf], top_k=2) == [1]
    assert kept([1.0, 3.0, 2.0], top_k=1) == [1]


def test_top_p_keeps_the_smallest_set_with_ties_to_the_lowest_id():
    assert kept([0.0] * 40, top_p=0.5) == list(range(20))
    assert kept([0.0] * 4, top_p=0.5) == [0, 1]
    assert kept([0.0] * 4, top_p=0.500001) == [0, 1, 2]
    assert kept([0.0, 0.0, 5.0, 0.0], top_p=0.985) == [0, 2]
    assert kept([1.0, 2.0], top_p=1e-300) == [1]
    assert kept([1.0, 2.0, -700.0], top_p=math.nextafter(1.0, 0.0)) == [0, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=200)
def test_top_p_agrees_with_a_plain_loop(weights, top_p):
    logits = [float(w) for w in weights]
    total = sum(map(math.exp, logits))
    expected: list[int] = []
    mass = 0.0
    for token in sorted(range(len(logits)), key=lambda t: (-logits[t], t)):
        if abs(mass - top_p) < 1e-9:
            return  # rounding decides; not a matter of definition
        if mass < top_p:
            expected.append(token)
        mass += math.exp(logits[token]) / total
    assert kept(logits, top_p=top_p) == sorted(expected)


def test_min_p_is_relative_to_the_most_likely():
    assert kept([0.0, math.log(0.5) + 1e-6, math.log(0.5) - 1e-6], min_p=0.5) == [0, 1]
    assert kept([2.0, 1.0, 2.0], min_p=1.0) == [0, 2]


def test_top_k_comes_before_top_p():
    """Of all mass, 0.8 needs three tokens; of the mass that top-k leaves it needs two."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert kept(logits, top_p=0.8) == [0, 1, 2]
    assert kept(logits, top_k=3, top_p=0.75) == [0, 1]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-3])
def test_tiny_temperature_tends_to_greedy(temperature):
    logits = torch.tensor([300.0, 10.0, 301.0, -math.inf])
    probs = make_sampler(4, temperature=temperature).probabilities(logits, tokens())
    assert probs.tolist() == [0.0, 0.0, 1.0, 0.0]


# Choosing


def test_greedy_takes_the_lowest_id_among_equals_in_every_type():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0], dtype=dtype)
        assert make_sampler(5).choose(logits, tokens()) == 1
        assert make_sampler(5, logit_bias={2: 1.0}).choose(logits, tokens()) == 1
        assert make_sampler(5, logit_bias={0: 2.0}).choose(logits, tokens()) == 0


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [True, True, True]),
        ({"min_tokens": 2}, [False, False, True]),
        ({"repetition_penalty": 1.1}, [False] * 3),
        ({"logit_bias": {1: 2.0}}, [False] * 3),
        ({"temperature": 0.5}, [False] * 3),
    ],
    ids=str,
)
def test_the_largest_logit_is_the_choice_where_nothing_changes_logits(params, expected):
    sampler = make_sampler(9, **params)
    assert [sampler.takes_largest(PROMPT + n) for n in range(3)] == expected


def test_coupled_choice_is_argmax_of_processed_plus_noise_at_the_position():
    logits, history = random_row(1)
    sampler = make_sampler(temperature=0.9, top_k=40, seed=12)
    for length in (0, 1, 17, 30):
        values = sampler.process(logits, history[:length])
        for stream in Stream:
            noisy = values + gumbel(12, length, VOCAB, stream)
            assert sampler.draw(logits, history[:length], stream) == noisy.argmax()
        assert sampler.choose(logits, history[:length]) == sampler.draw(
            logits, history[:length], Stream.TARGET
        )


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 0.1}, {"temperature": 50.0}], ids=str)
def test_padded_ids_are_never_sampled(params):
    logits = torch.cat([torch.zeros(3), torch.full((61,), 1e4)])
    logits[-1] = math.nan
    sampler = make_sampler(3, **params)
    assert {sampler.choose(logits, tokens(*[0] * n)) for n in range(60)} <= {0, 1, 2}
    processed = sampler.process(logits, tokens(*[0] * PROMPT))
    assert processed.shape == (3,)
    assert processed.dtype == (torch.float64 if params else torch.float32)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_draft_vocabulary_restricts_the_choice(params):
    logits = torch.full((1000,), -math.inf)
    logits[[400, 600]] = torch.tensor([0.3, 0.2])
    sampler = make_sampler(1000, **params)
    drawn = {sampler.choose(logits, tokens(*[0] * n)) for n in range(40)}
    assert drawn == ({400, 600} if params else {400})


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_a_mask_bans_before_all_else(params):
    """A bias cannot bring back what the mask bans, nor does the mask move the noise."""
    logits, history = random_row(2)
    permitted = np.zeros(VOCAB, dtype=np.uint8)
    permitted[[3, 40, 90]] = 1
    mask = np.packbits(permitted, bitorder="little").tobytes()
    banned = logits.masked_fill(torch.from_numpy(permitted == 0), -math.inf)
    sampler = make_sampler(logit_bias={50: 100.0}, **params)
    for length in range(len(history)):
        chosen = sampler.choose(logits, history[:length], mask)
        assert chosen == sampler.choose(banned, history[:length])
    nothing = bytes(len(mask))
    with pytest.raises(RequestError, match="no token that the model can say is permitted at 7"):
        sampler.choose(logits, history[:7], nothing)


def test_probabilities_are_softmax_or_one_hot():
    logits = torch.tensor([0.0, math.log(3.0), 0.0])
    warm = make_sampler(3, temperature=1.0).probabilities(logits, tokens())
    assert warm.tolist() == pytest.approx([0.2, 0.6, 0.2], rel=1e-7)
    assert warm.dtype == torch.float64
    cold = make_sampler(3).probabilities(logits, tokens())
    assert cold.tolist() == [0.0, 1.0, 0.0]
    assert cold.dtype == torch.float64


def test_logits_of_a_model_are_adjusted_in_double_precision():
    sampler = make_sampler(logit_bias={3: 0.1}, repetition_penalty=1.3)
    logits, history = random_row(4)
    logits, history = logits.float(), history[history != 3]
    adjusted = sampler.process(logits, history)
    assert torch.equal(adjusted, sampler.process(logits.double(), history))
    assert adjusted[3] == logits[3].double() + 0.1


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "logit_bias": {1: 5.0}},
        {"min_tokens": 200, "temperature": 1.0},
    ],
    ids=str,
)
def test_arguments_are_never_changed(params):
    for dtype in (torch.float64, torch.float32):
        logits, history = random_row(3)
        logits = logits.to(dtype)
        before = logits.clone(), history.clone()
        sampler = make_sampler(stop_ids=frozenset({5}), **params)
        sampler.choose(logits, history)
        sampler.probabilities(logits, history)
        assert torch.equal(logits, before[0])
        assert torch.equal(history, before[1])


# Refusals


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"presence_penalty": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_non_finite_logits_are_refused_wherever_they_are(params, dtype):
    sampler = make_sampler(**params)
    for index in range(VOCAB):
        for bad in (math.nan, math.inf):
            logits = torch.linspace(-1, 1, VOCAB, dtype=dtype)
            logits[index] = bad
            with pytest.raises(NonFiniteError, match=f"finite maximum, got {bad}"):
                sampler.choose(logits, tokens(*[0] * 9))
    with pytest.raises(NonFiniteError, match="got -inf"):
        sampler.choose(torch.full((VOCAB,), -math.inf, dtype=dtype), tokens())


def test_nan_hidden_behind_infinity_or_in_company_of_minus_infinity_is_refused():
    for logits in ([math.inf, math.nan], [math.nan, -math.inf], [-math.inf, math.inf]):
        with pytest.raises(NonFiniteError):
            make_sampler(2).choose(torch.tensor(logits), tokens())


def test_banning_every_token_is_refused():
    sampler = make_sampler(3, frozenset({1}), min_tokens=1)
    with pytest.raises(RequestError, match="ban and penalties must leave a finite largest logit"):
        sampler.choose(torch.tensor([-math.inf, 0.0, -math.inf]), tokens())


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ConfigError, match=r"logit_bias token id must be in \[0, 2\].*got 3"):
        make_sampler(3, logit_bias={3: 1.0})
    with pytest.raises(ConfigError, match=r"stop token id must be in \[0, 2\].*got 9"):
        make_sampler(3, frozenset({9}))


@pytest.mark.parametrize("shape", [(2,), (1, 3), ()])
def test_wrong_shapes_are_refused(shape):
    said = re.escape(f"logits must have shape [V], V >= 3, got {list(shape)}")
    with pytest.raises(ValueError, match=said):
        make_sampler(3).choose(torch.zeros(shape), tokens())
