"""Rows of candidate trees: each has the bits of plain decoding, whatever comes with it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

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
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.steps import WIDTH, CudaRunner
from ppsd.model.weights import open_source
from tests.support.layers import random_layer
from tests.support.tiny_models import save_perfect_head
from tests.support.trees import CONTEXT, CPU, LOOSE, Trees, run

BF16, LAYERS = torch.bfloat16, 3
SIZES = {
    "vocab_size": 40,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
compiled = pytest.mark.skipif(kernels.loaded() is None, reason="no C compiler")


def as_steps(weights: list[LayerWeights], spec: ModelSpec, rope: Rope, cache: KVCache) -> Runner:
    return CudaRunner(weights, spec, rope, cache, None)


KINDS = {
    "float64": (TorchRunner, torch.float64),
    "float32": (TorchRunner, torch.float32),
    "bfloat16": (TorchRunner, torch.bfloat16),
    "compiled": (CompiledRunner, torch.bfloat16),
    "steps": (as_steps, torch.float32),
}


@pytest.fixture(autouse=True)
def _as_in_decoding() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    if request.param == "compiled" and kernels.loaded() is None:
        pytest.skip("no C compiler")
    return request.param


@pytest.fixture
def trees(kind) -> Trees:
    build, dtype = KINDS[kind]
    torch.manual_seed(0)
    spec = spec_from_config(LlamaConfig(**SIZES), "small")
    return Trees(build, [random_layer(spec, dtype) for _ in range(LAYERS)], spec)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_trees_have_the_bits_of_plain_decoding(trees, seed: int) -> None:
    trees.luck.seed(seed)
    trees.life()


@compiled
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("heads", "groups", "size"), [(8, 1, 32), (5, 5, 96), (6, 3, 64), (16, 2, 256)]
)
def test_compiled_trees_of_other_sizes(heads: int, groups: int, size: int, threads: int) -> None:
    """More heads in a group than queries at once, or one; so large that threads share the work."""
    changed = {"hidden_size": 352, "head_dim": size, "num_key_value_heads": groups}
    config = Qwen3Config(**SIZES | changed | {"num_attention_heads": heads})
    spec = spec_from_config(config, "other")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    Trees(CompiledRunner, [random_layer(spec, BF16) for _ in range(LAYERS)], spec).life()


def test_chains_of_a_tree_may_be_longer_than_a_step(trees) -> None:
    trees.wave(3)
    trees.wave(WIDTH + 4, chain=True)


def test_a_wave_may_be_wider_than_the_kernels(trees) -> None:
    trees.wave(kernels.MAX_ROWS + 5)


def test_slots_of_very_different_lengths_travel_together(trees) -> None:
    for _ in range(2):
        trees.wave(WIDTH + 4, chain=True)
        trees.commit(1, trees.live[1][-1])
    trees.wave(12)


def test_plain_decoding_goes_on_behind_a_committed_branch(trees) -> None:
    trees.wave(9)
    node = trees.live[0][-1]
    trees.commit(0, node)
    row, position = trees.make_rows(1), trees.runner.cache.lengths[0]
    trees.expected(node)
    trees.plain.cache.commit(0, position, [])
    assert torch.equal(run(trees.runner, row, position, 0), run(trees.plain, row, position))


def test_a_wave_can_be_stopped_and_gone_on_with(trees) -> None:
    trees.wave(5, Watch())
    word = ctypes.c_int64(1)
    watch = Watch([ctypes.addressof(word)])
    word.value = 2
    for _ in range(3):
        trees.wave(3, watch)
    trees.wave(1, watch)


def test_between_stops_other_slots_may_run_and_cells_are_their_own(trees) -> None:
    trees.wave(4)
    nodes = [n for n in trees.grow(6) if n.place.slot == 0]
    trees.live[1].clear()
    started = trees.runner.start_rows(torch.cat([n.row for n in nodes]), [n.place for n in nodes])
    while not started.advance(Watch()):
        run(trees.runner, trees.make_rows(1), trees.runner.cache.lengths[1], 1)
    trees.check(nodes, started.hidden)


def test_a_dropped_wave_leaves_other_cells_and_lengths_alone(trees) -> None:
    trees.wave(6)
    cache = trees.runner.cache
    before = [tensor.clone() for tensor in cache.whole]
    lengths = list(cache.lengths)
    nodes = trees.grow(7)
    started = trees.runner.start_rows(torch.cat([n.row for n in nodes]), [n.place for n in nodes])
    started.advance(Watch())
    del started
    for node in nodes:
        for old, new in zip(before, cache.whole, strict=True):
            old[:, node.place.slot, :, node.place.cell] = 0
            new[:, node.place.slot, :, node.place.cell] = 0
    old_cells = [b[..., : CONTEXT + LOOSE, :] for b in before]
    new_cells = [t[..., : CONTEXT + LOOSE, :] for t in cache.whole]
    assert all(map(torch.equal, old_cells, new_cells))
    assert cache.lengths == lengths


def test_stages_and_heads_take_rows_of_trees(tiny_model, tmp_path) -> None:
    path = tiny_model()
    spec, source = describe(ModelFiles("tiny", path, is_gguf=False)), open_source(path)
    plan = StagePlan(0, 4, CONTEXT, torch.float32, CPU, slots=2, loose=4)
    plain = replace(plan, slots=1, loose=0)
    stage, alone = Stage(spec, plan, source), Stage(spec, plain, source)
    directory, identity = save_perfect_head(tmp_path, path, 4), Identity.of(spec, source)
    head, head_alone = (load_head(directory, spec, p, source, identity) for p in (plan, plain))
    stage.start(torch.tensor([5, 9]), 0, 1).advance()
    head.forward(alone.forward(torch.tensor([5, 9]), 0), 0, 1)
    places = [Place(1, 2, 2), Place(1, 2, CONTEXT), Place(1, 3, 3, (CONTEXT,)), Place(0, 0, 0)]
    started = stage.start_rows(torch.tensor([40, 7, 81, 3]), places)
    assert started.advance()
    features = head.forward_rows(started.hidden, places)
    for branch, row in (([40], 0), ([7], 1), ([7, 81], 2)):
        head_alone.forward(alone.forward(torch.tensor([5, 9]), 0), 0)
        for position, token in enumerate(branch, 2):
            hidden = alone.forward(torch.tensor([token]), position)
            expected = head_alone.forward(hidden, position)
        assert torch.equal(started.hidden[row : row + 1], hidden)
        assert torch.equal(features[row : row + 1], expected)
    for held in (stage, head):
        held.commit(1, 4, [(CONTEXT, 2)])
        assert held.cache.lengths == [0, 4]
    started = stage.start_rows(torch.tensor([11]), [Place(1, 4, CONTEXT + 1)])
    started.advance()
    hidden = alone.forward(torch.tensor([11]), 4)
    assert torch.equal(started.hidden, hidden)
    features = head.forward_rows(hidden, [Place(1, 4, CONTEXT + 1)])
    assert torch.equal(features, head_alone.forward(hidden, 4))


A, B = CONTEXT, CONTEXT + 1  # loose cells
WRONG = {
    "slot 2 is not": [Place(2, 5, 5)],
    "does not fit a cache that holds 5 of": [Place(0, 6, 6)],
    "with 2 unverified ancestors does not fit": [Place(0, 1, A, (A, B))],
    "at position 64": [Place(0, CONTEXT, A, tuple(range(5, CONTEXT)))],
    "cell 6 is not for a row at position 5": [Place(0, 5, 6)],
    "cell 88 is not for": [Place(0, 5, CONTEXT + LOOSE)],
    "cell -1 is not for": [Place(0, 5, -1)],
    "cell 7 is not for a row at position 5": [Place(0, 6, A, (7,))],
    "cell 4 of slot 0 holds a verified row": [Place(0, 4, 4)],
    "is taken twice": [Place(0, 5, A), Place(0, 5, A)],
    "taken twice": [Place(0, 6, A, (A,))],
    "or one of (64, 64), is taken": [Place(0, 7, B, (A, A))],
    "cell 64 is read before its row": [Place(0, 6, B, (A,)), Place(0, 5, A)],
    "cell 65 is read before": [Place(0, 5, B), Place(0, 5, A), Place(0, 7, 7, (A, B))],
    "2 rows do not stand at 0 places": [],
}


@pytest.mark.parametrize("message", WRONG)
def test_rows_that_cannot_be_are_refused(trees, message: str) -> None:
    runner, places = trees.runner, WRONG[message]
    rows = trees.make_rows(len(places) or 2)
    run(runner, trees.make_rows(5), 0, 0)
    run(runner, trees.make_rows(5), 0, 1)
    with pytest.raises(ProtocolError) as caught:
        runner.start_rows(rows, places)
    assert message in str(caught.value)
    assert runner.cache.lengths == [5, 5]


def cache_of(length: int) -> KVCache:
    cache = KVCache(2, 1, 8, 4, torch.float32, CPU, loose=3)
    for tensor in cache.whole:
        tensor[:] = torch.arange(11.0)[:, None]
    cache.commit(0, length, [])
    return cache


def test_a_commit_reads_all_cells_before_it_writes_any() -> None:
    cache = cache_of(3)
    cache.commit(0, 5, [(8, 3), (9, 4), (3, 8), (10, 9), (9, 10)])
    expected = torch.tensor([0.0, 1, 2, 8, 9, 5, 6, 7, 3, 10, 9])
    assert cache.lengths == [5]
    assert all((tensor[..., 0] == expected).all() for tensor in cache.whole)


@pytest.mark.parametrize(
    ("length", "moves", "message"),
    [
        (9, [], "9 rows are not within the cache's 8"),
        (-1, [], "-1 rows are not"),
        (4, [(11, 3)], "cells cannot be copied"),
        (4, [(8, 11)], "cells cannot be copied"),
        (4, [(-1, 3)], "cells cannot be copied"),
        (4, [(8, 2)], "beside 3 verified rows"),
        (4, [(8, 3), (9, 3)], "cells cannot be copied"),
    ],
)
def test_commits_that_cannot_be_are_refused(
    length: int, moves: list[tuple[int, int]], message: str
) -> None:
    cache = cache_of(3)
    with pytest.raises(ProtocolError, match=message):
        cache.commit(0, length, moves)
    assert cache.lengths == [3]
    with pytest.raises(ProtocolError, match="slot 1 is not"):
        cache.commit(1, 0, [])


def test_a_block_beyond_the_cache_is_refused(trees) -> None:
    with pytest.raises(ProtocolError, match="2 rows at position 64 do not fit a cache"):
        trees.runner.start(trees.make_rows(2), CONTEXT)
