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
from ppsd.model.passes import Watch
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
