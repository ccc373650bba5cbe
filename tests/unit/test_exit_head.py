"""Exit heads: on disk and back, refused when they do not fit, and never ahead of the true rows."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppsd.engine.choose import head_layers
from ppsd.engine.drafter import MAX_LAG_ROWS, DraftState, Given, HeadDrafter
from ppsd.errors import HeadError, NonFiniteError
from ppsd.model import kernels
from ppsd.model.exit_head import (
    ExitHead,
    head_tensor_shapes,
    load_head,
    most_probable,
    untrained_head,
)
from ppsd.model.head_files import CONFIG_FILE, WEIGHTS_FILE, HeadConfig, read_head_config, save_head
from ppsd.model.identity import Identity
from ppsd.model.names import EMBEDDING, FINAL_NORM
from ppsd.model.source import ModelFiles, describe
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.weights import open_source
from ppsd.plan.sizes import Sizes
from ppsd.speculation.lookup import ODDS
from ppsd.speculation.sampling import Sampler, Stream
from ppsd.types import SamplingParams
from tests.support.reference_model import reference_logits
from tests.support.tiny_models import VOCAB, save_perfect_head

WIDE = torch.float64
EXIT = 4
PLAN = StagePlan(0, EXIT, 64, WIDE, torch.device("cpu"))
DRAFT_IDS = [0, 3, 4, 99, 200, 299]


class Tiny:
    """The tiny model, heads made for it, and how to load them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = describe(ModelFiles("tiny", path, is_gguf=False))
        self.source = open_source(path)
        self.identity = Identity.of(self.spec, self.source)

    def config(self, **changes) -> HeadConfig:
        fixed = {"kind": "transformer", "exit_layer": EXIT, "layers": 1, "draft_vocab": None}
        mark, model = self.identity.fingerprint, self.identity.to_json()
        about = {"base_model": "tiny", "fingerprint": mark, "model": model}
        return HeadConfig(**fixed | changes | about)

    def save(self, directory: Path, config: HeadConfig, seed: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        shapes = head_tensor_shapes(config, self.spec)
        weights = {name: torch.randn(shape, dtype=WIDE) / 3 for name, shape in shapes.items()}
        if config.draft_vocab is not None:
            weights["draft_ids"] = torch.tensor(DRAFT_IDS)
        save_head(directory, config, weights)
        return weights

    def load(self, directory: Path, plan: StagePlan = PLAN) -> ExitHead:
        return load_head(directory, self.spec, plan, self.source, self.identity)


def said(head: ExitHead, rows: torch.Tensor) -> torch.Tensor:
    """Draft logits for rows after the exit layer."""
    return head.logits(head.finish(head.forward(rows, 0)), 0)


@pytest.fixture(scope="module")
def tiny(tiny_model) -> Tiny:
    return Tiny(tiny_model())


@pytest.fixture(scope="module")
def head_dir(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("head")
    tiny.save(directory, tiny.config())
    return directory


def hidden(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.randn((rows, 32), dtype=WIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "norm", "layers": 0},
        {"layers": 2, "trained": False},
        {"draft_vocab": len(DRAFT_IDS), "provenance": {"steps": 3}, "metrics": {"top1": 0.5}},
    ],
)
def test_saved_heads_come_back(tiny, tmp_path, changes) -> None:
    config = tiny.config(**changes)
    weights = tiny.save(tmp_path, config)
    assert read_head_config(tmp_path) == config
    head = tiny.load(tmp_path)
    direct = ExitHead(config, tiny.spec, PLAN, dict(weights), head.lm_head)
    rows = hidden(5)
    got, expected = (said(h, rows) for h in (head, direct))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert torch.equal(head.tensors.norm, weights["norm.weight"])


@pytest.mark.parametrize(
    "changes", [{}, {"layers": 2, "mlp": 8}, {"feedback": True}, {"kind": "norm", "layers": 0}]
)
def test_a_draft_is_planned_to_cost_what_the_head_holds(tiny, changes) -> None:
    config = tiny.config(**changes)
    shapes = head_tensor_shapes(config, tiny.spec).values()
    vectors = sum(shape[0] for shape in shapes if len(shape) == 1)
    within = 2 * config.layers * tiny.spec.hidden_size  # a layer's norms count
    sizes = Sizes.of(tiny.spec)
    held = sum(prod(shape) for shape in shapes) - vectors
    assert head_layers(sizes, config) * sizes.layer == pytest.approx(held + within)


def test_verified_rows_are_for_heads_with_feedback_only(tiny, tmp_path) -> None:
    tiny.save(tmp_path, tiny.config(feedback=True))
    head, rows = tiny.load(tmp_path), hidden(3)
    assert not torch.equal(head.finish(rows, hidden(3, seed=6)), head.finish(rows))
    torch.testing.assert_close(head.finish(rows, torch.zeros_like(rows)), head.finish(rows))
    tiny.save(tmp_path, tiny.config(kind="norm", layers=0, feedback=True))
    with pytest.raises(HeadError, match="feedback must be true or false, and false for a norm"):
        tiny.load(tmp_path)


def test_verified_rows_are_taken_to_the_heads_device(tiny, tmp_path) -> None:
    """Verdicts come to the CPU, wherever stages are; "meta" stands for a GPU."""
    tiny.save(tmp_path, tiny.config(feedback=True, copy_gate=True))
    head = tiny.load(tmp_path, replace(PLAN, device=torch.device("meta")))
    finished = head.finish(hidden(3).to("meta"), hidden(3))
    assert (finished.device.type, head.copy_odds(finished).shape) == ("meta", (3, len(ODDS)))


@pytest.mark.parametrize("gate", [False, True])
def test_a_copy_gate_weighs_copies_row_by_row(tiny, tmp_path, gate: bool) -> None:
    weights = tiny.save(tmp_path, tiny.config(copy_gate=gate))
    head, rows = tiny.load(tmp_path), hidden(3)
    expected = ODDS.expand(3, -1)
    if gate:
        expected = rows @ weights["copy.weight"].T + weights["copy.bias"]
    torch.testing.assert_close(head.copy_odds(rows), expected)
    tiny.save(tmp_path, tiny.config(kind="norm", layers=0, copy_gate=True))
    with pytest.raises(HeadError, match="copy_gate must be true or false, and false for a norm"):
        tiny.load(tmp_path)


def test_a_draft_vocabulary_scores_its_tokens_as_the_full_one_does(tiny, tmp_path) -> None:
    weights = tiny.save(tmp_path / "part", tiny.config(draft_vocab=len(DRAFT_IDS)))
    weights.pop("draft_ids")
    save_head(tmp_path / "full", tiny.config(), weights)
    full, part = tiny.load(tmp_path / "full"), tiny.load(tmp_path / "part")
    expected = said(full, hidden(3))
    got = said(part, hidden(3))
    assert got.shape == (3, VOCAB)
    torch.testing.assert_close(got[:, DRAFT_IDS], expected[:, DRAFT_IDS], rtol=0, atol=1e-12)
    others = sorted(set(range(VOCAB)) - set(DRAFT_IDS))
    assert (got[:, others] == -torch.inf).all()


def test_an_untrained_head_is_the_models_own_norm_and_lm_head(tiny) -> None:
    head = untrained_head(tiny.spec, PLAN, tiny.source, tiny.identity.fingerprint)
    rows = hidden(4)
    norm, table = tiny.source.load(FINAL_NORM, WIDE), tiny.source.load(EMBEDDING, WIDE)
    expected = torch.nn.functional.rms_norm(rows, (32,), norm, tiny.spec.rms_norm_eps) @ table.T
    torch.testing.assert_close(said(head, rows), expected, rtol=0, atol=1e-10)
    assert not head.config.trained


def test_a_head_of_the_remaining_layers_is_the_model(tiny, tmp_path) -> None:
    """Stage 0's rows through a perfect head give the reference's logits."""
    tokens = torch.tensor([5, 7, 9, 200, 31])
    head = tiny.load(save_perfect_head(tmp_path, tiny.path, EXIT))
    rows = Stage(tiny.spec, PLAN, tiny.source).forward(tokens, 0)
    assert rows is not None
    expected = reference_logits(tiny.spec, tiny.source, tokens, WIDE)
    torch.testing.assert_close(said(head, rows), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1, 6, 1]])
def test_rows_in_a_block_equal_rows_one_by_one(tiny, head_dir, sizes) -> None:
    rows = hidden(8)
    single, block = tiny.load(head_dir), tiny.load(head_dir)
    expected = torch.cat([single.forward(rows[i : i + 1], i) for i in range(8)])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [block.forward(rows[a : a + n], a) for a, n in zip(starts, sizes, strict=True)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


# Refusals


def change_json(directory: Path, **changes: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 1}, "format 2"),
        ({"kind": "mamba"}, "'mamba'"),
        ({"kind": "norm"}, "'norm' with 1 layers"),
        ({"layers": 0}, "'transformer' with 0 layers"),
        ({"layers": "one"}, "layers must be .* 'one'"),
        ({"layers": -1}, "layers must be .* -1"),
        ({"exit_layer": None}, "exit_layer must be .* None"),
        ({"draft_vocab": 0}, "draft_vocab must be .* 0"),
        ({"fingerprint": 5}, "fingerprint must be a text, got 5"),
        ({"unknown": 1}, "unknown"),
        ({"metrics": []}, r"metrics must be an object, got \[\]"),
        ({"provenance": None}, "provenance must be an object, got None"),
        ({"model": {"sizes": {}}}, "model holds no sizes and final_norm"),
        ({"model": 5}, "model holds no sizes and final_norm"),
        ({"model": []}, r"model must be an object, got \[\]"),
        (
            {"fingerprint": "f" * 64, "model": {}},
            "belongs to tiny, not to tiny: .*ffffffffffff.*--force-head",
        ),
        ({"exit_layer": 3}, "reads layer 3, but stage 0 ends at layer 4"),
        ({"layers": 2}, r"head.safetensors does not hold .*layers\.1"),
        ({"draft_vocab": 6}, "head.safetensors does not hold .*draft_ids"),
    ],
)
def test_a_foreign_or_damaged_configuration_is_named(tiny, tmp_path, changes, words) -> None:
    tiny.save(tmp_path, tiny.config())
    change_json(tmp_path, **changes)
    with pytest.raises(HeadError, match=words) as caught:
        tiny.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b'{"format": 2}'])
def test_a_configuration_that_is_no_head_is_named(tiny, tmp_path, content) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(HeadError, match=CONFIG_FILE):
        tiny.load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_named_pipe_is_refused_and_not_waited_for(tiny, tmp_path, name) -> None:
    tiny.save(tmp_path, tiny.config())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(HeadError, match=f"cannot read {tmp_path / name}: not a regular file"):
        tiny.load(tmp_path)


def test_missing_and_truncated_files_are_named(tiny, tmp_path) -> None:
    with pytest.raises(HeadError, match=f"no exit head at .*{CONFIG_FILE} is missing"):
        tiny.load(tmp_path / "nowhere")
    tiny.save(tmp_path, tiny.config())
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(HeadError, match=r"cannot read .*safetensors"):
        tiny.load(tmp_path)
    weights.unlink()
    with pytest.raises(HeadError, match=r"cannot read .*safetensors"):
        tiny.load(tmp_path)


@pytest.mark.parametrize(
    "draft_ids",
    [
        torch.tensor([0, 3, 4, 99, 200, 300]),
        torch.tensor([-1, 3, 4, 99, 200, 299]),
        torch.tensor([0, 3, 3, 99, 200, 299]),
        torch.tensor([0.0, 3, 4, 99, 200, 299]),
        torch.tensor([0, 3, 4, 99, 200, 299], dtype=torch.int32),
    ],
)
def test_draft_ids_that_are_no_vocabulary_are_named(tiny, tmp_path, draft_ids) -> None:
    config = tiny.config(draft_vocab=6)
    weights = tiny.save(tmp_path, config)
    save_head(tmp_path, config, weights | {"draft_ids": draft_ids})
    with pytest.raises(HeadError, match="draft_ids must be int64 and ascend within"):
        tiny.load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tiny, tmp_path) -> None:
    weights = tiny.save(tmp_path, tiny.config())
    save_head(tmp_path, tiny.config(), weights | {"norm.weight": torch.ones(31)})
    with pytest.raises(HeadError, match=r"norm\.weight is \(31,\), not \(32,\)"):
        tiny.load(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_named(tiny, tmp_path, bad: float) -> None:
    weights = tiny.save(tmp_path, tiny.config(copy_gate=True))
    save_head(tmp_path, tiny.config(copy_gate=True), weights | {"copy.bias": ODDS.double() * bad})
    with pytest.raises(HeadError, match=r"copy\.bias holds numbers that are not finite"):
        tiny.load(tmp_path)


# Many rows


def by_the_book(scores: torch.Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    rows = scores.float().softmax(1).tolist()
    order = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in rows]
    return order, [[row[i] for i in best] for row, best in zip(rows, order, strict=True)]


@pytest.mark.parametrize("size", [1, 6, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_most_probable_come_first_and_equals_by_id(size: int, k: int) -> None:
    scores = torch.randn(9, size).bfloat16().double()
    scores[1] = 0.5  # all are equal
    scores[2, : size // 2] = -torch.inf
    scores[3] = (scores[3] * 2).round()  # many are
    scores[4] = -500 * torch.arange(size)  # all but one have probability 0
    scores[5] = scores[5].sort().values
    for dtype in (WIDE, torch.float32, torch.bfloat16):
        columns, probabilities = most_probable(scores.to(dtype), k)
        assert (columns.dtype, probabilities.dtype) == (torch.int64, torch.float32)
        expected = by_the_book(scores.to(dtype), k)
        assert (columns.tolist(), probabilities.tolist()) == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_opinions_of_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = torch.randn(3, 200)
    scores[1, 150 if bad != -torch.inf else slice(None)] = bad
    with pytest.raises(NonFiniteError, match="finite maximum"):
        most_probable(scores, 4)


@pytest.mark.parametrize("dtype", [WIDE, torch.float32, torch.bfloat16])
def test_opinions_name_real_ids_and_do_not_depend_on_other_rows(tiny, tmp_path, dtype) -> None:
    tiny.save(tmp_path, tiny.config(draft_vocab=len(DRAFT_IDS), copy_gate=True, feedback=True))
    head = tiny.load(tmp_path, replace(PLAN, dtype=dtype))
    features, verified = hidden(20).to(dtype), hidden(20, 6).to(dtype)
    finished = torch.cat([head.finish(features[i : i + 1], verified[i : i + 1]) for i in range(20)])
    ids, probabilities = head.opinions(finished, 4, [0] * 20)
    assert set(ids.flatten().tolist()) <= set(DRAFT_IDS)
    alone = [head.opinions(row, 4, [0]) for row in finished.split(1)]
    assert torch.equal(ids, torch.cat([one for one, _ in alone]))
    assert torch.equal(probabilities, torch.cat([one for _, one in alone]))
    chances = head.logits(finished, 0).float().softmax(1)
    torch.testing.assert_close(chances.gather(1, ids), probabilities, rtol=1e-2, atol=0)
    assert head.opinions(finished, 9, [0] * 20)[0].shape == (20, len(DRAFT_IDS))
    if dtype == torch.bfloat16 and kernels.loaded() is not None:
        some = slice(0, kernels.MAX_ROWS)
        assert torch.equal(head.finish(features[some], verified[some]), finished[some])
        for method in (lambda rows: head.scores(rows, 0), head.copy_odds):
            rows = torch.cat([method(row) for row in finished[some].split(1)])
            assert torch.equal(method(finished[some]), rows)


# Lag and rollback

steps = st.lists(
    st.tuples(
        st.integers(0, 3),  # how far back to write
        st.integers(1, MAX_LAG_ROWS + 3),  # how many rows
        st.booleans(),  # whether to draft afterwards
    ),
    min_size=1,
    max_size=7,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(steps)
def test_a_draft_depends_on_the_true_rows_only(tiny, head_dir, steps) -> None:
    """However rows came, lagged and were taken back: a fresh head that sees them says the same."""
    drafter, state = HeadDrafter(tiny.load(head_dir)), DraftState()
    sampler = Sampler(SamplingParams(temperature=0.9, seed=1), 1, frozenset(), VOCAB)
    true = hidden(0)
    for seed, (back, rows, draft) in enumerate([*steps, (0, 1, True)]):
        start = max(0, len(true) - back)
        if start + rows > 60:
            break
        true = torch.cat([true[:start], hidden(rows, seed)])
        drafter.observe(state, start, true[start:])
        if not draft:
            continue
        fresh, other = HeadDrafter(tiny.load(head_dir)), DraftState()
        fresh.observe(other, 0, true)
        given = Given(sampler, torch.arange(len(true)), Stream.DRAFT)
        assert drafter.draft(state, given) == fresh.draft(other, given)
        drawn, expected = state.drawn[len(true)], other.drawn[len(true)]
        torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-9)
