"""Stages: rows are addressed by position, and chained stages are the whole model in any split."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from ppsd.errors import ProtocolError
from ppsd.model.cache import KVCache
from ppsd.model.names import expected_shapes, tensor_names
from ppsd.model.passes import Watch
from ppsd.model.source import ModelFiles, describe
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.weights import open_source
from tests.support.reference_model import reference_logits
from tests.support.tiny_models import LAYERS

WIDE, CPU = torch.float64, torch.device("cpu")
TOKENS = torch.tensor([5, 7, 9, 200, 31, 8, 77, 12])


class Model:
    """A tiny model opened by hand: any of its stages, and its reference logits."""

    def __init__(self, path) -> None:
        self.spec = describe(ModelFiles("tiny", path, is_gguf=False))
        self.source = open_source(path)

    def stage(self, first: int, last: int) -> Stage:
        return Stage(self.spec, StagePlan(first, last, 32, WIDE, CPU), self.source)

    def chain(self, bounds: tuple[int, ...]) -> list[Stage]:
        return [self.stage(a, b) for a, b in pairwise(bounds)]

    def reference(self, tokens: torch.Tensor) -> torch.Tensor:
        return reference_logits(self.spec, self.source, tokens, WIDE)


@pytest.fixture(scope="module")
def model(tiny_model) -> Model:
    return Model(tiny_model())


def run(stages: list[Stage], tokens: torch.Tensor, position: int = 0) -> torch.Tensor:
    rows: torch.Tensor | None = tokens
    for stage in stages:
        assert rows is not None
        rows = stage.forward(rows, position)
    assert rows is not None
    return stages[-1].logits(rows)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("stages", range(1, LAYERS + 1))
def test_every_split_of_every_size_is_the_reference_model(model, stages) -> None:
    expected = model.reference(TOKENS)
    for cuts in combinations(range(1, LAYERS), stages - 1):
        chain = model.chain((0, *cuts, LAYERS))
        close(run(chain, TOKENS[:3]), expected[:3])
        for p in range(3, len(TOKENS)):  # then token by token, over the cache
            close(run(chain, TOKENS[p : p + 1], p), expected[p : p + 1])


@pytest.mark.parametrize("family", ["llama", "llama-biased"])
def test_stages_own_every_tensor_and_share_only_a_tied_embedding(tiny_model, family) -> None:
    spec = Model(tiny_model(family)).spec
    for cuts in combinations(range(1, LAYERS), 2):
        owned = [n for a, b in pairwise((0, *cuts, LAYERS)) for n in tensor_names(spec, a, b)]
        assert set(owned) == set(expected_shapes(spec))
        twice = {name for name in owned if owned.count(name) > 1}
        assert twice == ({"model.embed_tokens.weight"} if spec.tie_embeddings else set())


def test_biases_count(tiny_model) -> None:
    biased = Model(tiny_model("llama-biased"))
    close(run(biased.chain((0, 2, LAYERS)), TOKENS), biased.reference(TOKENS))


def test_rows_without_a_token_have_no_logit(model) -> None:
    whole = model.stage(0, LAYERS)
    whole.spec = replace(model.spec, unused_ids=(3, 9))
    hidden = whole.forward(TOKENS[:2], 0)
    for logits in (whole.logits(hidden), whole.row_logits(hidden)):
        assert logits.isneginf().nonzero().tolist() == [[0, 3], [0, 9], [1, 3], [1, 9]]


@pytest.mark.parametrize("position", range(8))
def test_rewriting_a_position_rolls_back_everything_after_it(model, position) -> None:
    chain = model.chain((0, 2, LAYERS))
    run(chain, TOKENS)
    changed = TOKENS[: position + 1].clone()
    changed[position] = 150
    close(run(chain, changed[position:], position), model.reference(changed)[position:])
    assert [stage.cache.lengths for stage in chain] == [[position + 1]] * 2
    if position < 6:
        with pytest.raises(ProtocolError, match=f"position {position + 2} .* holds"):
            chain[0].forward(TOKENS[:1], position + 2)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("position", [3, 8])
def test_a_dropped_pass_leaves_nothing_that_counts(model, layer, position) -> None:
    """Rows half written at ``position`` are void, and those before it are as they were."""
    stage = model.stage(0, LAYERS)
    run([stage], TOKENS)
    dropped = stage.start(torch.tensor([99, 98]), position)
    assert not any(dropped.advance(Watch()) for _ in range(layer))
    assert stage.cache.lengths == [position]
    with pytest.raises(ProtocolError, match="do not fit"):
        stage.forward(TOKENS[:1], position + 1)
    again = torch.cat([TOKENS[:position], torch.tensor([44, 45, 46])])
    close(run([stage], again[position:], position), model.reference(again)[position:])


def test_a_cache_refuses_gaps_negative_positions_and_overflow() -> None:
    cache = KVCache(1, 2, 8, 4, WIDE, CPU)
    with pytest.raises(ProtocolError, match="holds 0 of 8"):
        cache.reserve(1, 1)
    cache.reserve(0, 5)
    cache.advance(0, 5)
    for position, rows in [(6, 1), (-1, 1), (5, 4), (0, 9)]:
        with pytest.raises(ProtocolError, match="holds 5 of 8"):
            cache.reserve(position, rows)
        assert cache.lengths == [5], "a refusal changes nothing"
    cache.reserve(5, 3)
    cache.advance(5, 3)
    assert cache.lengths == [8]


def test_a_cache_lies_on_the_device_asked_for() -> None:
    cache = KVCache(2, 2, 8, 4, WIDE, torch.device("meta"))
    assert {(t.device.type, t.dtype) for t in (*cache.keys, *cache.values)} == {("meta", WIDE)}
