"""α computed at once is α of the engine, draft by draft; and what becomes of it in the summary."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.errors import ConfigError, HeadError, PpsdError
from ppsd.measure.acceptance import (
    OUTSIDE,
    WORST_RANK,
    Answer,
    Candidate,
    Outcome,
    _by_lag,
    exit_layers,
    labels,
    load_candidates,
    measure,
    rank,
    write_answers,
)
from ppsd.measure.acceptance_summary import (
    decode,
    expected_speed,
    first_right,
    rate,
    summarize,
)
from ppsd.measure.workload import Task
from ppsd.model.head_files import HeadConfig, read_head_config, save_head
from ppsd.model.source import describe, resolve_model
from ppsd.speculation.lookup import ODDS
from ppsd.train.interval import interval
from ppsd.train.run import Teacher
from tests.support.teachers import tiny_config, tiny_teacher
from tests.support.tiny_models import save_perfect_head

Models = Callable[[str], Path]
CONTEXT = 48
NEW = 14
WORDS = ["fox", "the quick", "box my jugs", "five dozen lazy dogs", "o"]
TASKS = [
    Task(str(i), "even" if i % 2 == 0 else "odd", ({"role": "user", "content": text},))
    for i, text in enumerate([*WORDS, "pack " * 16])  # the last answer is cut by the context
]
GREEDY = SamplingParams(max_tokens=NEW)
SAMPLED = SamplingParams(0.7, seed=3, max_tokens=NEW)


def save_middling_head(
    path: Path,
    model: Path,
    exit_layer: int,
    draft_ids: torch.Tensor | None = None,
    *,
    extras: bool = False,
) -> Path:
    """A head that is right now and then: the rest of the model, shaken.

    ``extras``: feedback and a copy gate.
    """
    from safetensors.torch import load_file

    save_perfect_head(path, model, exit_layer)
    weights = load_file(path / "head.safetensors")
    generator = torch.Generator().manual_seed(exit_layer)
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        weights[name] = tensor + 0.04 * tensor.std() * noise
    config = read_head_config(path)
    if extras:
        width = len(weights["norm.weight"])
        weights["feedback_norm.weight"] = torch.ones(width).double()
        weights["feedback.weight"] = 0.3 * torch.randn(width, width, generator=generator).double()
        weights["copy.weight"] = 0.3 * torch.randn(len(ODDS), width, generator=generator).double()
        weights["copy.bias"] = ODDS.double()
        config = HeadConfig(**{**vars(config), "feedback": True, "copy_gate": True})
    if draft_ids is not None:
        weights["draft_ids"] = draft_ids
        config = HeadConfig(**{**vars(config), "draft_vocab": len(draft_ids)})
    save_head(path, config, weights)
    return path


@pytest.fixture(scope="module")
def model(tiny_model: Models) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def teacher(model: Path) -> Teacher:
    return tiny_teacher(model, tiny_config(max_length=CONTEXT))


@pytest.fixture(scope="module")
def heads(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One head each after layers 2 and 4, one that cannot draft every token, one with extras."""
    root = tmp_path_factory.mktemp("heads")
    some = torch.arange(0, 296, 2)
    return [
        save_middling_head(root / "two", model, 2),
        save_middling_head(root / "four", model, 4),
        save_middling_head(root / "half", model, 2, some),
        save_middling_head(root / "back", model, 2, extras=True),
    ]


@pytest.fixture(scope="module")
def candidates(heads: list[Path], teacher: Teacher) -> list[Candidate]:
    return load_candidates(heads, teacher, "both")


def ask(teacher: Teacher, path: Path, params: SamplingParams, batch: int = 4) -> list[Answer]:
    return write_answers(teacher, TASKS, params, batch, path, lambda report: None)


def open_llm(model: Path, candidate: Candidate, split: tuple[int, ...], **more: object) -> LLM:
    return LLM(
        str(model),
        head=str(candidate.path),
        split=split,
        dtype="float64",
        transport="inprocess",
        max_context=CONTEXT,
        lookup=candidate.lookup,
        gate=False,  # a pause would leave drafts out
        **more,
    )


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_every_draft_is_judged_as_the_engine_judges_it(
    teacher: Teacher, model: Path, candidates: list[Candidate], tmp_path: Path, params
) -> None:
    """No tolerance: the same answers, the same drafts judged, the same ones accepted."""
    answers = ask(teacher, tmp_path / "answers.jsonl", params)
    path = tmp_path / "outcomes.jsonl"
    found = {
        stages: measure(
            teacher, candidates, answers, params, path, batch_tokens=100, in_flight=stages
        )
        for stages in (2, 3)
    }
    assert any(len(a.tokens) == CONTEXT for a in answers)
    for candidate in candidates:
        exit_layer = candidate.head.config.exit_layer
        for split in ((exit_layer,), (exit_layer, 5)):
            outcomes = found[len(split) + 1][candidate.label]
            with open_llm(model, candidate, split) as llm:
                for answer, outcome in zip(answers, outcomes, strict=True):
                    said = llm.run(answer.tokens[: answer.start], params)
                    assert said.token_ids == answer.tokens[answer.start :]
                    flags = tuple(int(flag) for flag in said.accepted)
                    assert flags[: answer.judged] == outcome.hits
                    counts = said.stats.counts
                    assert counts.judged == answer.judged
                    assert counts.accepted == sum(outcome.hits)
        alpha = summarize(outcomes)["alpha"]
        assert 0.1 < alpha < 0.95, "a head that is always or never right proves little"


def test_draft_then_verify_judges_a_part_of_the_same_drafts(
    teacher: Teacher, model: Path, candidates: list[Candidate], tmp_path: Path
) -> None:
    """What a round judges: drafts up to the first wrong one; the token after them has none."""
    answers = ask(teacher, tmp_path / "answers.jsonl", GREEDY)
    path = tmp_path / "outcomes.jsonl"
    outcomes = measure(teacher, candidates[:1], answers, GREEDY, path, batch_tokens=100)["two"]
    block = 3
    with open_llm(model, candidates[0], (2,), mode="draft-then-verify", block=block) as llm:
        for answer, outcome in zip(answers, outcomes, strict=True):
            said = llm.run(answer.tokens[: answer.start], GREEDY)
            judged, i = [], 1  # the first token comes from the prompt, without a draft
            while i < len(said.token_ids):
                drafts = [*range(i, min(i + block - 1, answer.judged))]
                missed = next((p for p in drafts if not outcome.hits[p]), None)
                judged += drafts if missed is None else [*range(i, missed + 1)]
                i = i + len(drafts) + 1 if missed is None else missed + 1
            assert said.stats.counts.judged == len(judged)
            accepted = [p for p in judged if outcome.hits[p]]
            assert [p for p, flag in enumerate(said.accepted) if flag] == accepted


def test_the_engine_agrees_in_the_decode_report(
    teacher: Teacher, model: Path, candidates: list[Candidate], tmp_path: Path
) -> None:
    answers = ask(teacher, tmp_path / "answers.jsonl", GREEDY)
    path = tmp_path / "outcomes.jsonl"
    outcomes = measure(teacher, candidates[:1], answers, GREEDY, path, batch_tokens=100)["two"]
    total = sum(a.judged for a in answers)
    accepted = sum(sum(o.hits) for o in outcomes)
    with open_llm(model, candidates[0], (2,)) as llm:
        report = decode(llm, answers, outcomes, GREEDY)
        turned = [Outcome(o.id, "", tuple(int(not rank) for rank in o.ranks)) for o in outcomes]
        wrong = decode(llm, answers, turned, GREEDY)
        other = [Answer(a.id, "", (*a.tokens[:-3], 3, 3, 3), a.start, a.judged) for a in answers]
        parted = decode(llm, other, outcomes, GREEDY)
    assert (report["judged"], report["accepted"]) == (total, accepted)
    assert report["offline"] == {"judged": total, "accepted": accepted}
    assert (report["equal_tokens"], report["compared"]) == (len(answers), total)
    assert (report["differing"], wrong["differing"]) == (0, total)
    assert report["late"] == 0
    assert parted["equal_tokens"] == 0
    assert parted["compared"] == sum(min(a.judged, len(a.tokens) - a.start - 3) for a in answers)


def test_a_stopped_measurement_goes_on(
    teacher: Teacher, candidates: list[Candidate], tmp_path: Path, monkeypatch
) -> None:
    answers = ask(teacher, tmp_path / "answers.jsonl", GREEDY)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    def run(path: Path, some: list[Candidate]) -> tuple[dict[str, list[Outcome]], list[int]]:
        seen: list[int] = []
        found = measure(teacher, some, answers, GREEDY, path, batch_tokens=60,
                        report=lambda done, total: seen.append(done))  # fmt: skip
        return found, seen

    expected, steps = run(whole, candidates)
    assert (steps[0], steps[-1]) == (0, len(answers))
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:7]) + lines[7][:30])  # killed while writing
    found, _ = run(cut, candidates)
    assert found == expected
    assert sorted(cut.read_text().splitlines()) == sorted(line.strip() for line in lines)

    monkeypatch.setattr("ppsd.measure.acceptance.teacher_forward", None)  # nothing is left to do
    assert run(cut, candidates) == (expected, [len(answers)])
    assert run(cut, candidates[1:])[0]["four"] == expected["four"]


def test_outcomes_of_other_settings_are_not_taken(
    teacher: Teacher, candidates: list[Candidate], tmp_path: Path
) -> None:
    path, asked = tmp_path / "outcomes.jsonl", tmp_path / "answers.jsonl"
    answers = ask(teacher, asked, GREEDY)
    for params in (GREEDY, SAMPLED):
        measure(teacher, candidates[:1], answers, params, path, batch_tokens=100)
    assert len(path.read_text().splitlines()) == 2 * len(answers)
    for ranks in ("[0]", '["x"]', "[]"):
        path.write_text(re.sub(r'"ranks": \[.*?\]', f'"ranks": {ranks}', path.read_text()))
        with pytest.raises(PpsdError, match=r"outcomes\.jsonl holds no outcome of \d+ drafts"):
            measure(teacher, candidates[:1], answers, GREEDY, path, batch_tokens=100)
    path.write_text('{"key": 1}\n')
    with pytest.raises(PpsdError, match="does not hold measured outcomes"):
        measure(teacher, candidates[:1], answers, GREEDY, path, batch_tokens=100)
    teacher = replace(teacher, encoding=replace(teacher.encoding, weights="others"))
    with pytest.raises(PpsdError, match=r"with weights '[0-9a-f]{16}', not 'others'"):
        ask(teacher, asked, GREEDY)


def test_further_heads_do_not_ask_the_model_again(
    teacher: Teacher, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "answers.jsonl"
    first = ask(teacher, path, GREEDY)
    monkeypatch.setattr("ppsd.train.selfgen.BatchGenerator._prefill", None)
    assert ask(teacher, path, GREEDY, batch=1) == first
    with pytest.raises(PpsdError, match=r"with --max-new \(in acceptance --max-tokens\) 14, not 9"):
        ask(teacher, path, SamplingParams(max_tokens=9))


def test_prompts_without_room_are_left_out(teacher: Teacher, tmp_path: Path) -> None:
    long = Task("long", "odd", ({"role": "user", "content": "zq" * CONTEXT},))
    answers = write_answers(
        teacher, [TASKS[0], long], GREEDY, 4, tmp_path / "a.jsonl", lambda report: None
    )
    assert [a.id for a in answers] == ["0"]
    with pytest.raises(PpsdError, match="no prompt leaves room for two tokens within 48"):
        write_answers(teacher, [long], GREEDY, 4, tmp_path / "b.jsonl", lambda report: None)


def test_rank_counts_what_comes_before() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, -torch.inf])
    assert [rank(scores, token) for token in range(5)] == [3, 0, 2, 1, OUTSIDE]
    assert rank(-torch.arange(50.0), 30) == WORST_RANK


def outcome(category: str, *ranks: int) -> Outcome:
    return Outcome("x", category, ranks)


def test_summary_by_hand() -> None:
    outcomes = [
        outcome("a", 0, 0, 1, OUTSIDE, 3, 0, 8, 0, 0, 2),
        outcome("b", 1, 0),
        outcome("a", 7, 0, 0),
    ]
    figures = summarize(outcomes)
    assert (figures["prompts"], figures["judged"], figures["accepted"]) == (3, 15, 8)
    assert figures["alpha"] == 8 / 15
    assert figures["top"] == {"1": 8 / 15, "2": 10 / 15, "4": 12 / 15, "8": 13 / 15}
    assert figures["outside"] == 1 / 15
    assert {c: f["alpha"] for c, f in figures["by_category"].items()} == {"a": 7 / 13, "b": 0.5}
    assert figures["by_category"]["b"]["interval"] is None
    first, second = figures["by_position"]
    assert (first["first"], first["last"], first["judged"], first["accepted"]) == (1, 8, 13, 7)
    assert (second["first"], second["last"], second["alpha"]) == (9, 16, 0.5)
    assert (first["prompts"], second["prompts"]) == (3, 1)


def test_interval_is_over_prompts() -> None:
    """Ten prompts, each all right or all wrong: the binomial of ten, not of a thousand."""
    low, high = interval([100] * 5 + [0] * 5, [100] * 10) or (0, 0)
    assert (low, high) == (0.2, 0.8)  # the binomial quantiles of 10 draws at 1/2
    assert interval([5] * 10, [10] * 10) == (0.5, 0.5)
    assert interval([5], [10]) is None
    assert rate([(0, 1), (0, 0)])["interval"] == (0.5, 1.0)


def test_first_right_by_hand() -> None:
    early = [outcome("a", 0, 1, 1, OUTSIDE), outcome("a", 0)]
    late = [outcome("a", 0, 0, 2, 0), outcome("a", 5)]
    figures = first_right({"early": early, "late": late})
    assert figures["counts"] == {"early": 2, "late": 2, "none": 1}
    assert figures["shares"] == {"early": 0.4, "late": 0.4, "none": 0.2}
    assert figures["judged"] == 5


def test_expected_speed_by_hand(model: Path) -> None:
    """Six layers, exit 2, equal weights: at α = 1 a tick is the slower stage."""
    spec = describe(resolve_model(str(model)))
    head = HeadConfig("transformer", 2, 1, 32, "tiny", "")
    layer, token = spec.layer_parameters, spec.hidden_size
    figures = expected_speed(spec, head, 1.0, 2)
    lm_head = (spec.vocab_size + 1) * token / layer  # and the final norm
    read = layer + token**2 + 32 * token  # its layer, its input matrix, and LM head rows
    assert figures["head_layers"] == pytest.approx(read / layer)
    assert figures["split"] == [2]
    assert figures["speedup"] == pytest.approx((6 + lm_head) / (4 + lm_head))
    assert figures["paper"] == 3.0
    assert expected_speed(spec, head, 0.0, 2)["paper"] == 1.0
    with pytest.raises(ConfigError, match="exit_layer must be an integer in"):
        expected_speed(spec, head, 0.5, 6)


def test_heads_are_named_and_refused(
    heads: list[Path], tmp_path: Path, tiny_model: Models, teacher: Teacher
) -> None:
    assert labels(heads) == ["two", "four", "half", "back"]
    assert exit_layers(heads, teacher.stage.spec) == (2, 4)
    one, other = tmp_path / "a" / "x", tmp_path / "b" / "x"
    assert labels([one, other]) == ["a-x", "b-x"]
    with pytest.raises(ConfigError, match="head must be directories of different names"):
        labels([one, one])
    with pytest.raises(HeadError, match="no exit head at"):
        exit_layers([one], teacher.stage.spec)
    stranger = save_perfect_head(tmp_path / "stranger", tiny_model("qwen2"), 2)
    with pytest.raises(HeadError, match="belongs to"):
        load_candidates([stranger], teacher)


def test_outcome_lines_say_what_they_are(
    teacher: Teacher, candidates: list[Candidate], tmp_path: Path
) -> None:
    path = tmp_path / "outcomes.jsonl"
    answers = ask(teacher, tmp_path / "answers.jsonl", GREEDY)
    found = measure(teacher, candidates[6:7], answers, GREEDY, path, batch_tokens=100)["half alone"]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(r["head"], r["id"], r["category"], tuple(r["ranks"])) for r in rows} == {
        ("half alone", o.id, o.category, o.ranks) for o in found
    }
    for answer, result in zip(answers, found, strict=True):
        prompt, judged = (
            answer.tokens[: answer.start],
            answer.tokens[answer.start :][: answer.judged],
        )
        outside = [token % 2 == 1 and token not in prompt for token in judged]
        assert [r == OUTSIDE for r in result.ranks] == outside


def test_verified_rows_are_chosen_where_they_lie() -> None:
    """PyTorch's meta device refuses what a GPU would: rows there times a mask of the CPU."""
    lags: list[torch.Tensor] = []

    class Head:
        config = SimpleNamespace(feedback=True)

        def finish(self, rows: torch.Tensor, verified: torch.Tensor) -> torch.Tensor:
            lags.append(verified)
            return rows

        def logits(self, rows: torch.Tensor, request: int) -> torch.Tensor:
            return rows

        def copy_odds(self, rows: torch.Tensor) -> torch.Tensor:
            return rows

    rows = torch.zeros(5, 4, device="meta")
    assert len(list(_by_lag(Head(), rows, rows, 3))) == 5
    assert [verified.device.type for verified in lags] == ["meta"] * 3
