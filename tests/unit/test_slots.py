"""Several sequences side by side in one cache: each is what it would be alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from ppsd.errors import ProtocolError
from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.exit_head import load_head
from ppsd.model.identity import Identity
from ppsd.model.layers import LayerWeights, Rope
from ppsd.model.passes import Place, Watch
from ppsd.model.runners import CompiledRunner, Runner, TorchRunner
from ppsd.model.source import ModelFiles, describe
from ppsd.model.spec import ModelSpec, spec_from_config
from ppsd.model.stage import Stage, StagePlan, new_runner
from ppsd.model.steps import CudaRunner
from ppsd.model.weights import open_source
from tests.support.layers import rand, random_layer
from tests.support.tiny_models import save_perfect_head

CPU, BF16, CONTEXT, LAYERS = torch.device("cpu"), torch.bfloat16, 64, 3
SIZES = {
    "vocab_size": 40,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
Build = Callable[[int], Runner]


def as_steps(weights: list[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache) -> Runner:
    return CudaRunner(weights, spec, rope, cache, None)


@pytest.fixture(params=[TorchRunner, CompiledRunner, as_steps])
def build(request) -> Build:
    """Make a runner of the same layers with so many slots."""
    if request.param is CompiledRunner and kernels.loaded() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    spec = spec_from_config(LlamaConfig(**SIZES), "small")
    weights = [random_layer(spec, BF16) for _ in range(LAYERS)]
    rope = Rope(spec, CONTEXT, BF16, CPU)

    def make(slots: int) -> Runner:
        sizes = (LAYERS, spec.num_kv_heads, CONTEXT, spec.head_dim, BF16, CPU)
        return request.param(weights, spec, rope, KVCache(*sizes, slots=slots, spare=1))

    return make


@pytest.mark.parametrize(
    ("dtype", "layers", "sizes", "kind"),
    [
        (BF16, 1, {}, CompiledRunner),
        (torch.float32, 1, {}, TorchRunner),
        (BF16, 1, {"intermediate_size": 152}, TorchRunner),  # no multiple of what a step takes
        (BF16, 1, {"head_dim": 24}, TorchRunner),
        (BF16, 0, {}, TorchRunner),
    ],
)
def test_what_runs_layers_is_chosen_by_dtype_and_sizes(dtype, layers, sizes, kind) -> None:
    if kernels.loaded() is None:
        pytest.skip("no C compiler")
    spec = spec_from_config(LlamaConfig(**SIZES | sizes), "small")
    weights = [random_layer(spec, dtype) for _ in range(layers)]
    cache = KVCache(layers, spec.num_kv_heads, CONTEXT, spec.head_dim, dtype, CPU)
    assert type(new_runner(weights, spec, Rope(spec, CONTEXT, dtype, CPU), cache)) is kind


def run(runner: Runner, rows: torch.Tensor, position: int, slot: int = 0) -> torch.Tensor:
    started = runner.start(rows, position, slot)
    assert started.advance()
    return started.hidden


@torch.inference_mode()
def test_sequences_in_turn_have_the_bits_of_each_alone(build: Build) -> None:
    """Among them a prompt of more rows than the kernels take, and a rollback in one slot."""
    torch.manual_seed(1)
    rows = [rand(40, 96, dtype=BF16) for _ in range(3)]
    blocks = [(0, 20), (20, 21), (21, 24), (22, 30), (30, 40)]  # the fourth writes over the third
    together = build(3)
    found = [[run(together, r[a:b], a, i) for i, r in enumerate(rows)] for a, b in blocks]
    for i, row in enumerate(rows):
        alone = build(1)
        for (a, b), outputs in zip(blocks, found, strict=True):
            assert torch.equal(run(alone, row[a:b], a), outputs[i])


@torch.inference_mode()
def test_passes_of_two_slots_may_run_layer_by_layer_in_turn(build: Build) -> None:
    torch.manual_seed(1)
    rows, runner = [rand(2, 96, dtype=BF16) for _ in range(2)], build(2)
    expected = [run(build(1), r, 0) for r in rows]
    passes = [runner.start(r, 0, slot) for slot, r in enumerate(rows)]
    waiting = list(passes)
    while waiting:
        waiting = [started for started in waiting if not started.advance(Watch())]
    assert all(torch.equal(p.hidden, e) for p, e in zip(passes, expected, strict=True))


def test_a_slot_keeps_its_own_length_and_others_do_not_exist(build: Build) -> None:
    runner, row = build(2), rand(1, 96, dtype=BF16)
    with torch.inference_mode():
        run(runner, rand(5, 96, dtype=BF16), 0, 1)
        with pytest.raises(ProtocolError, match="holds 0 of"):
            runner.start(row, 5, 0)
        run(runner, row, 5, 1)
    for slot in (-1, 2):
        with pytest.raises(ProtocolError, match=f"slot {slot} is not one of the cache's 2"):
            runner.start(row, 0, slot)


@torch.inference_mode()
def test_stages_and_heads_have_slots(tiny_model: Callable[[], Path], tmp_path: Path) -> None:
    path = tiny_model()
    spec, source = describe(ModelFiles("tiny", path, is_gguf=False)), open_source(path)
    plan = StagePlan(0, 4, CONTEXT, torch.float32, CPU, slots=2)
    stages = [Stage(spec, replace(plan, slots=slots), source) for slots in (2, 1, 1)]
    directory = save_perfect_head(tmp_path, path, 4)
    identity = Identity.of(spec, source)
    heads = [load_head(directory, spec, s.plan, source, identity) for s in stages]
    texts = torch.tensor([[5, 9, 40], [7, 81, 3]])
    for position in range(3):
        for slot, text in enumerate(texts):
            token = text[position : position + 1]
            started, alone = stages[0].start(token, position, slot), stages[1 + slot]
            assert started.advance()
            expected = alone.forward(token, position)
            assert expected is not None
            assert torch.equal(started.hidden, expected)
            row = heads[0].forward(expected, position, slot)
            assert torch.equal(row, heads[1 + slot].forward(expected, position))


def small(**more: int) -> KVCache:
    """Return a cache of 8 positions and 3 loose cells whose first slot holds 4 verified rows."""
    cache = KVCache(1, 1, 8, 2, torch.float64, CPU, **{"slots": 2, "loose": 3} | more)
    assert (cache.lengths, cache.whole[0].dtype) == ([0] * len(cache.lengths), torch.float64)
    cache.reserve(0, 4)
    cache.advance(0, 4)
    return cache


def test_a_cache_has_so_many_cells() -> None:
    assert [tensor.shape for tensor in small().whole] == [(1, 2, 1, 11, 2)] * 2
    assert small(spare=2).whole[1].shape == (1, 2, 1, 13, 2)
    alone = KVCache(1, 1, 8, 2, torch.float64, CPU)
    assert (alone.whole[0].shape, alone.lengths) == ((1, 1, 1, 8, 2), [0])


def test_rows_are_written_within_what_there_is() -> None:
    cache = small()
    assert cache.lengths == [4, 0]
    for position, rows in ((4, 4), (0, 8), (2, 1)):
        cache.lengths[0] = 4
        cache.reserve(position, rows)
        assert cache.lengths == [position, 0]
    for place in ((5, 1, 0), (4, 5, 0), (-1, 1, 0), (1, 1, 1), (0, 1, 2), (0, 1, -1)):
        cache.lengths[0] = 4
        with pytest.raises(ProtocolError):
            cache.reserve(*place)
        assert cache.lengths == [4, 0]


ROW = Place(0, 4, 4)


@pytest.mark.parametrize(
    "places",
    [
        [ROW],
        [Place(0, 4, 8), Place(0, 4, 10)],
        [ROW, Place(0, 5, 5, (4,)), Place(0, 6, 9, (4, 5))],
        [Place(0, 5, 8, (10,))],  # whose parent was in an earlier wave
        [Place(1, 0, 0)],
        [Place(1, 0, 8), Place(1, 1, 1, (8,))],
        [Place(0, 7, 7, (4, 5, 6))],
        [Place(0, 2, 8)],
    ],
    ids=str,
)
def test_rows_of_a_tree_may_stand_there(places) -> None:
    small().check(places, len(places))


@pytest.mark.parametrize(
    "places",
    [
        [],
        [Place(0, 5, 5)],  # whose parent is not there
        [Place(1, 1, 1)],
        [Place(0, 8, 8, (4, 5, 6, 7))],  # beyond the capacity
        [Place(0, 8, 9, (4, 5, 6, 7))],
        [Place(0, 4, 5)],  # another position's cell
        [Place(0, 4, 11)],  # beyond the loose ones
        [Place(0, 5, 5, (6,))],
        [Place(0, 5, 5, (11,))],
        [Place(0, 3, 3)],  # a verified row's cell
        [ROW, Place(0, 4, 4)],
        [Place(0, 4, 8), Place(0, 4, 8)],
        [Place(0, 5, 8, (8,))],  # its own cell for its parent
        [Place(0, 6, 9, (8, 8))],
        [Place(0, 5, 5, (8,)), Place(0, 4, 8)],  # a child before its parent
        [Place(0, 4, 8), Place(0, 6, 6, (4, 8))],  # a parent from another position
        [Place(0, 0, 8, (4,))],
        [Place(2, 0, 0)],
    ],
    ids=str,
)
def test_rows_of_a_tree_may_not_stand_there(places) -> None:
    with pytest.raises(ProtocolError):
        small().check(places, len(places))
    with pytest.raises(ProtocolError):
        small().check([ROW], 2)


@pytest.mark.parametrize(
    ("length", "moves"),
    [(0, []), (8, []), (5, [(8, 4)]), (6, [(10, 4), (8, 5)]), (1, [(0, 1)]), (8, [(9, 7)])],
    ids=str,
)
def test_rows_become_true(length, moves) -> None:
    cache = small()
    for i, tensor in enumerate(cache.whole):
        tensor[0, 0, 0] = torch.arange(22.0).view(11, 2) + 100 * i
    before = [tensor.clone() for tensor in cache.whole]
    cache.commit(0, length, moves)
    assert cache.lengths == [length, 0]
    for tensor, old in zip(cache.whole, before, strict=True):
        for source, target in moves:
            old[0, 0, 0, target] = old[0, 0, 0, source]
        assert torch.equal(tensor, old)


@pytest.mark.parametrize(
    ("slot", "length", "moves"),
    [
        (0, 9, []),
        (0, -1, []),
        (2, 0, []),
        (0, 5, [(11, 4)]),
        (0, 5, [(-1, 4)]),
        (0, 5, [(8, 11)]),
        (0, 6, [(8, 4), (9, 4)]),
        (0, 5, [(8, 3)]),
        (0, 3, [(8, 2)]),
    ],
)
def test_what_cannot_be_true_changes_nothing(slot, length, moves) -> None:
    cache = small()
    with pytest.raises(ProtocolError):
        cache.commit(slot, length, moves)
    assert cache.lengths == [4, 0]


def test_rows_that_are_there_can_be_shared() -> None:
    for length in (0, 4):
        cache = small()
        for tensor in cache.whole:
            tensor[:, 0] = 7.0
        cache.share(0, 1, length)
        assert cache.lengths == [4, length]
        assert all(int((tensor[0, 1, 0, :, 0] == 7.0).sum()) == length for tensor in cache.whole)
    for source, slot, length in ((0, 1, 5), (0, 1, -1), (1, 0, 1), (0, 2, 1), (2, 0, 0)):
        with pytest.raises(ProtocolError):
            small().share(source, slot, length)
