"""The layer functions against formulas written out by hand, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Qwen3Config

from ppsd.model import layers
from ppsd.model.layers import DecoderLayer, Rope, attend, causal_mask, linear
from ppsd.model.spec import ModelSpec, spec_from_config
from tests.support.layers import CPU, WIDE, rand, random_layer, run_layer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["llama-biased", "qwen3"])
def spec(request) -> ModelSpec:
    if request.param == "qwen3":
        return spec_from_config(Qwen3Config(**SIZES), "tiny")
    return spec_from_config(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "tiny")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_rms_norm_is_x_over_its_root_mean_square() -> None:
    x, weight = rand(5, 24), rand(24)
    for row, normed in zip(x, layers.rms_norm(x, weight, 1e-5), strict=True):
        mean = sum(v * v for v in row.tolist()) / 24
        close(normed, row / math.sqrt(mean + 1e-5) * weight)


def test_rms_norm_of_narrow_floats_is_computed_in_float32() -> None:
    x, weight = rand(3, 24, dtype=torch.bfloat16) * 100, rand(24, dtype=torch.bfloat16)
    scale = 1 / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(layers.rms_norm(x, weight, 1e-5), (x.float() * scale).bfloat16() * weight)


def test_rope_turns_each_pair_by_its_angle(spec) -> None:
    rope = Rope(spec, 64, WIDE, CPU)
    x, position = rand(3, 2, 8), 11
    turned = rope.rotate(x, position)
    for row in range(3):
        for i, frequency in enumerate(spec.inv_freq):
            angle = torch.tensor(position + row).float() * torch.tensor(frequency).float()
            z = torch.complex(x[row, :, i], x[row, :, i + 4]) * torch.polar(
                torch.tensor(spec.rope_scale, dtype=WIDE), angle.double()
            )
            close(turned[row, :, i], z.real, 1e-6)  # the tables are float32, as transformers' are
            close(turned[row, :, i + 4], z.imag, 1e-6)


def test_rope_makes_scores_depend_on_distance_only(spec) -> None:
    rope = Rope(spec, 64, WIDE, CPU)
    q, k = rand(1, 1, 8), rand(1, 1, 8)
    scores = [(rope.rotate(q, p + 5) * rope.rotate(k, p)).sum() for p in (0, 20, 50)]
    close(torch.stack(scores), scores[0].expand(3), 1e-5)
    assert abs(scores[0] - (rope.rotate(q, 6) * rope.rotate(k, 0)).sum()) > 1e-3


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int
) -> torch.Tensor:
    """Every head and row by itself, keys repeated for the heads that share them."""
    shared = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    rows = []
    for i in range(q.shape[0]):
        seen = position + i + 1
        scores = torch.einsum("hd,htd->ht", q[i], k[:, :seen]) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v[:, :seen]).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [(6, 2), (6, 6), (6, 1)])
@pytest.mark.parametrize(("position", "rows"), [(0, 1), (7, 1), (0, 5), (7, 2), (7, 5)])
def test_attend_equals_repeated_keys_head_by_head(heads, position, rows) -> None:
    q = rand(rows, heads[0], 8)
    k, v = rand(heads[1], position + rows, 8), rand(heads[1], position + rows, 8)
    mask = causal_mask(position, rows, CPU)
    close(attend(q, k, v, mask), plain_attention(q, k, v, position))


def test_causal_mask_lets_each_row_see_itself_and_the_past() -> None:
    assert causal_mask(3, 1, CPU) is None
    mask = causal_mask(2, 3, CPU)
    assert mask is not None
    assert [[t for t in range(5) if row[t]] for row in mask] == [
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]


def test_the_feed_forward_is_gated_silu(spec) -> None:
    """With attention that says nothing, it is all that a layer adds."""
    w, rows = random_layer(spec), rand(4, 24)
    silent = replace(w, o=torch.zeros_like(w.o), o_bias=None)
    x = layers.rms_norm(rows, w.post_norm, spec.rms_norm_eps)
    zero = torch.zeros((), dtype=WIDE)
    both = x @ w.gate_up.T + (zero if w.gate_up_bias is None else w.gate_up_bias)
    gate, up = both[:, :20], both[:, 20:]
    expected = (gate / (1 + (-gate).exp()) * up) @ w.down.T
    added = expected + (zero if w.down_bias is None else w.down_bias)
    rope = Rope(spec, 4, WIDE, CPU)
    got = DecoderLayer(silent, spec)(rows, rope, lambda q, k, v: q.flatten(1))
    close(got, rows + added)


def test_a_block_of_rows_equals_single_rows(spec) -> None:
    w, x = random_layer(spec), rand(12, 24)
    single, keys = run_layer(spec, w, x, [1] * 12)
    for sizes in ([12], [5, 7], [1, 4, 1, 6]):
        block, block_keys = run_layer(spec, w, x, sizes)
        close(block, single)
        close(block_keys, keys)


def test_a_row_does_not_depend_on_later_rows(spec) -> None:
    w, x = random_layer(spec), rand(6, 24)
    changed = x.clone()
    changed[4:] += 1
    close(run_layer(spec, w, changed, [6])[0][:4], run_layer(spec, w, x, [6])[0][:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [layers.WIDEN_ROWS - 1, layers.WIDEN_ROWS, 9])
@pytest.mark.parametrize("at_once", [7, 20])
def test_widened_products_are_the_float32_products_rounded_once(
    monkeypatch, dtype, rows, at_once
) -> None:
    monkeypatch.setattr(layers, "NATIVE", {dtype: False})
    monkeypatch.setattr(layers, "WIDEN_AT_ONCE", at_once)
    x, weight, bias = rand(rows, 24, dtype=dtype), rand(20, 24, dtype=dtype), rand(20, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    got = linear(x, weight, bias)
    assert got.dtype == dtype
    if rows >= layers.WIDEN_ROWS:
        parts = [slice(i, i + at_once) for i in range(0, 20, at_once)]
        wide = [F.linear(x.float(), weight[p].float(), bias[p].float()) for p in parts]
        assert torch.equal(got, torch.cat(wide, 1).to(dtype))
        assert torch.equal(linear(x, weight), torch.cat([linear(x, weight[p]) for p in parts], 1))
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_layer_is_the_wide_layer_up_to_rounding(monkeypatch, dtype, spec) -> None:
    """With and without widening: both stay within a few rounding errors of float64."""
    w, x = random_layer(spec, dtype), rand(9, 24, dtype=dtype)
    wide = replace(w, **{k: v.double() for k, v in vars(w).items() if v is not None})
    exact = run_layer(spec, wide, x.double(), [9])[0]
    scale = exact.abs().max() * torch.finfo(dtype).eps
    for native in (True, False):
        monkeypatch.setattr(layers, "NATIVE", {dtype: native})
        close(run_layer(spec, w, x, [9])[0].double(), exact, float(8 * scale))
