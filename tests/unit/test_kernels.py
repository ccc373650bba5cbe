"""The compiled layer: right to rounding, and the same bits for every block."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Qwen3Config

from ppsd.model import kernels, layers
from ppsd.model.layers import FIELDS, LayerWeights
from ppsd.model.passes import Watch
from ppsd.model.runners import CompiledRunner, Runner, TorchRunner
from ppsd.model.spec import ModelSpec, spec_from_config
from ppsd.model.stage import StagePlan, new_cache
from tests.support.layers import rand, random_layer, run_layer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps
THREAD_WORK = 65536  # products.h
compiled = pytest.mark.skipif(kernels.loaded() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def _as_in_decoding() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture(params=["llama-biased", "qwen3"])
def spec(request) -> ModelSpec:
    if request.param == "qwen3":
        return spec_from_config(Qwen3Config(**SIZES), "small")
    return spec_from_config(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), "small")


def scaled_layer(spec: ModelSpec) -> LayerWeights:
    """Weights whose products are about as large as what goes in."""
    wide = random_layer(spec)
    shrunk = {k: v if v is None or v.dim() == 1 else v / 3 for k, v in tensors(wide).items()}
    return narrowed(LayerWeights(**shrunk), BF16)


def tensors(weights: LayerWeights) -> dict[str, torch.Tensor | None]:
    return {field.name: getattr(weights, field.name) for field in FIELDS}


def narrowed(weights: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    given = {k: v.to(dtype) for k, v in tensors(weights).items() if v is not None}
    return replace(weights, **given)


@compiled
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11, 16])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_rounded_once(rows: int, biased: bool) -> None:
    x, weight = rand(rows, 96, dtype=BF16), rand(37, 96, dtype=BF16)
    bias = rand(37, dtype=BF16) if biased else None
    assert kernels.supports(weight, 96)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(
        layers.Product(weight, bias)(x).double(), exact, rtol=EPS / 2, atol=1e-4
    )


@compiled
def test_norms_are_rounded_once() -> None:
    x, weight = rand(3, 7, 96, dtype=BF16) * 30, rand(96, dtype=BF16)
    exact = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(
        layers.Norm(weight, 1e-5)(x).double(), exact, rtol=EPS / 2 * 1.001, atol=0
    )


@compiled
@pytest.mark.parametrize("sizes", [[1] * 40, [16, 16, 8], [3, 1, 4, 2, 5, 9, 16]])
def test_a_layer_is_right_and_no_less_so_than_pytorchs(
    spec: ModelSpec, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = scaled_layer(spec), rand(40, 96, dtype=BF16)
    exact, exact_keys = run_layer(spec, narrowed(w, torch.float64), x.double(), [40])
    got, keys = run_layer(spec, w, x, sizes)
    monkeypatch.setattr(kernels, "loaded", lambda: None)
    theirs, their_keys = run_layer(spec, w, x, sizes)
    assert error(got, exact) <= 1.1 * error(theirs, exact)
    assert error(keys, exact_keys) <= 1.1 * error(their_keys, exact_keys)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error."""
    return float((got.double() - exact).square().mean().sqrt())


@compiled
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_every_block(spec: ModelSpec, threads: int) -> None:
    w, x = scaled_layer(spec), rand(40, 96, dtype=BF16)
    alone = run_layer(spec, w, x, [1] * 40)
    torch.set_num_threads(threads)
    for sizes in ([16, 16, 8], [7, 2, 3, 4, 5, 6, 13]):
        assert all(map(torch.equal, run_layer(spec, w, x, sizes), alone))


LARGE = SIZES | {"hidden_size": 384, "intermediate_size": 416, "head_dim": 64}


@compiled
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (4, 1), (6, 3)])
def test_threads_share_large_layers(heads: int, groups: int) -> None:
    """Products and attention are large enough for several threads; more positions than a page."""
    sizes = LARGE | {"num_attention_heads": heads, "num_key_value_heads": groups}
    spec = spec_from_config(LlamaConfig(**sizes), "larger")
    w, x = scaled_layer(spec), rand(320, 384, dtype=BF16)
    assert heads * len(x) * 64 > THREAD_WORK
    assert w.down.numel() > THREAD_WORK
    blocks = [16] * 20
    alone = run_layer(spec, w, x, blocks)
    exact = run_layer(spec, narrowed(w, torch.float64), x.double(), [320])
    for got, right in zip(alone, exact, strict=True):
        assert error(got, right) < 4 * EPS * float(right.square().mean().sqrt())
    for threads, cut in ((3, blocks), (2, [1] * 320)):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run_layer(spec, w, x, cut), alone))


@compiled
def test_large_numbers_saturate_and_nan_stays(spec: ModelSpec) -> None:
    w, x = scaled_layer(spec), rand(3, 96, dtype=BF16)
    w.gate_up.mul_(1e4)
    w.qkv.mul_(1e4)
    assert run_layer(spec, w, x, [3])[0].isfinite().all()
    x[1, 5] = torch.nan
    out = run_layer(spec, w, x, [3])[0]
    assert out[0].isfinite().all()
    assert out[1:].isnan().all()


@compiled
@pytest.mark.parametrize("biased", [False, True])
def test_a_prepared_product_has_the_bits_of_a_norm_and_a_product(biased: bool) -> None:
    x, weight, norm = rand(5, 96, dtype=BF16), rand(37, 96, dtype=BF16), rand(96, dtype=BF16)
    bias = rand(37, dtype=BF16) if biased else None
    product = layers.Product(weight, bias)
    expected = product(layers.Norm(norm, 1e-5)(x))
    normed = layers.Product(weight, bias, norm, 1e-5)
    assert torch.equal(normed(x), expected)
    assert torch.equal(normed(x[1:2]), expected[1:2])
    assert torch.equal(normed(torch.cat([x, x], 1)[:, :96]), expected)  # rows apart in memory


def test_a_product_of_other_kinds_or_many_rows_is_pytorchs() -> None:
    for rows, dtype in ((3, torch.float32), (17, BF16)):
        x, weight, norm = (rand(*size, dtype=dtype) for size in ((rows, 96), (37, 96), (96,)))
        expected = layers.linear(layers.rms_norm(x, norm, 1e-5), weight)
        assert torch.equal(layers.Product(weight, None, norm, 1e-5)(x), expected)


@compiled
@pytest.mark.parametrize("size", [1, 31, 255, 256, 257, 1000])
def test_the_largest_is_what_numpy_finds(size: int) -> None:
    x = rand(9, size + 3, dtype=BF16)
    x[1] = -x[1].abs() - 1
    x[2] = 0.5  # all equal
    x[3] = -torch.inf
    x[3, size // 2] = torch.finfo(BF16).min
    x[4, size - 1] = x[4].max()
    x[5] = torch.tensor([-0.0, 0.0]).repeat(size + 3)[: size + 3]  # equal as well
    x[6] = x[6].sort().values
    x[7, size:] = torch.inf  # not among them
    expected = x[:, :size].float().numpy().argmax(1).tolist()
    assert kernels.largest(x, size) == tuple(expected)


@compiled
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 300, 599])
def test_numbers_that_are_not_finite_are_found(bad: float, at: int) -> None:
    x = rand(3, 600, dtype=BF16)
    assert kernels.all_finite(x)
    assert kernels.largest(x, 600) is not None
    x[2, at] = bad
    if bad != bad:
        x.view(torch.int16)[2, at] |= torch.tensor(0x7FFF if at else -1, dtype=torch.int16)
    assert not kernels.all_finite(x)
    assert kernels.largest(x, 600) is None
    x[2] = -torch.inf
    assert not kernels.all_finite(x)
    assert kernels.largest(x, 600) is None


def test_of_other_kinds_nothing_is_found() -> None:
    x = rand(2, 64)
    assert not kernels.all_finite(x)
    assert kernels.largest(x, 64) is None
    assert kernels.largest(x.bfloat16()[:, ::2], 32) is None


class Watched:
    """Three layers, started on a row; two words to watch."""

    def __init__(self, spec: ModelSpec, capacity: int = 8) -> None:
        plan = StagePlan(0, 3, capacity, BF16, torch.device("cpu"))
        self.cache = new_cache(spec, 3, plan)
        weights = [scaled_layer(spec) for _ in range(3)]
        rope = layers.Rope(spec, capacity, BF16, plan.device)
        self.compiled = CompiledRunner(weights, spec, rope, self.cache)
        self.operations = TorchRunner(weights, spec, rope, self.cache)
        self.row = rand(1, 96, dtype=BF16)
        self.words = [ctypes.c_int64(7), ctypes.c_int64(-7)]
        self.watch = Watch([ctypes.addressof(word) for word in self.words])


@pytest.fixture(params=["compiled", "operations"])
def watched(spec: ModelSpec, request) -> tuple[Watched, Runner]:
    if request.param == "compiled" and kernels.loaded() is None:
        pytest.skip("no C compiler")
    held = Watched(spec)
    return held, getattr(held, request.param)


def finished(runner: Runner, rows: torch.Tensor, position: int = 0) -> torch.Tensor:
    started = runner.start(rows, position)
    assert started.advance()
    return started.hidden.clone()


def test_a_pass_stops_before_a_layer_only_if_a_word_has_changed(watched) -> None:
    held, runner = watched
    expected = finished(runner, held.row)
    started = runner.start(held.row, 0)
    held.watch.look()
    assert started.advance(held.watch)
    assert torch.equal(started.hidden, expected)
    for word in held.words:
        started = runner.start(held.row, 0)
        held.watch.look()
        word.value += 1
        assert not started.advance(held.watch), "the word changed before the second layer"
        assert not started.advance(held.watch), "nobody has looked at it yet"
        held.watch.look()
        assert started.advance(held.watch)
        assert torch.equal(started.hidden, expected)
        assert held.cache.lengths == [1]


def test_without_words_a_pass_stops_after_every_layer(watched) -> None:
    held, runner = watched
    expected = finished(runner, held.row)
    started, watch = runner.start(held.row, 0), Watch()
    assert [started.advance(watch) for _ in range(3)] == [False, False, True]
    assert torch.equal(started.hidden, expected)


def test_a_dropped_pass_leaves_its_rows_void(watched) -> None:
    held, runner = watched
    finished(runner, held.row)
    assert held.cache.lengths == [1]
    assert not runner.start(held.row, 0).advance(Watch())
    assert held.cache.lengths == [0]


@compiled
@pytest.mark.parametrize("native", [False, True])
def test_a_long_block_has_the_bits_of_its_rows_unless_the_cpu_multiplies_bfloat16(
    spec: ModelSpec, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layers.NATIVE, BF16, native)
    held, rows = Watched(spec, 64), rand(40, 96, dtype=BF16)
    compiled = held.compiled
    assert not compiled.start(rows, 0).advance(Watch())
    assert held.cache.lengths == [0]
    if native:
        expected = finished(held.operations, rows)
    else:
        expected = torch.cat([finished(compiled, rows[i : i + 1], i) for i in range(40)])
    assert torch.equal(finished(compiled, rows), expected)
    assert held.cache.lengths == [40]


@compiled
def test_products_do_not_follow_the_callers_defaults() -> None:
    x, weight = rand(3, 96, dtype=BF16), rand(5, 96, dtype=BF16)
    product = layers.Product(weight)
    expected = product(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(product(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@compiled
def test_gradients_dtypes_sizes_and_devices_are_left_to_pytorch() -> None:
    fit = rand(16, 96, dtype=BF16)
    assert kernels.supports(fit, 96, 32)
    assert not kernels.supports(fit, 96, 48)
    assert not kernels.supports(fit.float(), 96)
    assert not kernels.supports(fit.to("meta"), 96)
    assert not kernels.supports(fit.clone().requires_grad_(), 96)


@compiled
def test_a_compiler_that_lets_rows_differ_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    library = kernels.loaded()
    assert library is not None
    kernels._check(library)
    call = kernels.Product.__call__
    monkeypatch.setattr(
        kernels.Product, "__call__", lambda self, x: call(self, x) * (1 + len(x) % 2)
    )
    with pytest.raises(RuntimeError, match="depends on other rows"):
        kernels._check(library)
