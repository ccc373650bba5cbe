"""Task benchmarks: summaries against hand-computed numbers, and real runs on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.baselines import GREEDY, BaselineBench, Outsider, OutsiderProcess, outsiders
from ppsd.lab.runner import PLAIN, Cell, Measurement, Results, interleaved, run
from ppsd.lab.tasks import PPSD, TaskBench, digest, summarize, variants
from ppsd.measure.workload import Task
from ppsd.types import SamplingParams

Models = Callable[[str], Path]
TASKS = [Task(str(i), "text", ({"role": "user", "content": "abc" * (i + 1)},)) for i in range(2)]
NAMES = [f"{task.id} @ {GREEDY}" for task in TASKS]
PARAMS = SamplingParams(max_tokens=6)


def made(variant: str, task: str, tokens: int, seconds: float, output: str = "x") -> Measurement:
    names = ("drafted", "judged", "accepted", "discarded", "resyncs")
    counts = dict(zip(names, (9, 4, 3, 5, 1), strict=True))
    return Measurement(variant, task, 0, tokens, seconds, 0.5, counts, "", {"output": output})


def test_summaries_are_what_they_say() -> None:
    results = Results(None, {}, {})
    for m in (
        made(PLAIN, "a", 10, 10.0), made(PLAIN, "b", 30, 10.0),
        made(PPSD, "a", 10, 5.0), made(PPSD, "b", 30, 8.0, "y"),
    ):  # fmt: skip
        results.add(m)
    plain, ppsd = summarize(results, {"both": ["a", "b"]}, stages=2)
    assert (plain.variant, plain.ratio, plain.total_ratio) == (PLAIN, 1.0, 1.0)
    assert (ppsd.tasks, ppsd.judged, ppsd.alpha, ppsd.differing) == (2, 8, 0.75, 1)
    assert ppsd.speed == pytest.approx(40 / 13)
    assert ppsd.per_device == pytest.approx(20 / 13)
    assert ppsd.total_ratio == pytest.approx((40 / 13) / 2)
    assert ppsd.ratio == pytest.approx((2 + 3.75) / 2 / 2)
    assert (ppsd.paired.low, ppsd.paired.high) == pytest.approx((1.4375, 1.8125))


def test_what_plain_decoding_ended_with_its_first_token_is_left_out() -> None:
    results = Results(None, {}, {})
    for m in (
        made(PLAIN, "a", 0, 0.0), made(PPSD, "a", 5, 1.0),
        made(PLAIN, "b", 10, 10.0), made(PPSD, "b", 10, 5.0),
    ):  # fmt: skip
        results.add(m)
    assert [(s.tasks, s.ratio) for s in summarize(results, {"both": ["a", "b"]}, stages=2)] == [
        (1, 1.0),
        (1, 2.0),
    ]


def test_reliability_sums_what_requests_counted() -> None:
    results = Results(None, {}, {})
    for task, right in (("a", [0, 3]), ("b", [1, 2])):
        results.add(made(PLAIN, task, 10, 10.0))
        waves = made("ppsd rows=4", task, 10, 5.0)
        waves.counts.update(stated=[4, 3], right=right)
        results.add(waves)
    plain, found = summarize(results, {"all": ["a", "b"]}, stages=2)
    assert plain.reliability == []
    assert found.reliability == [(8, 1), (6, 5)]


def test_a_group_without_measurements_has_no_summary() -> None:
    results = Results(None, {}, {})
    results.add(made(PPSD, "a", 10, 5.0))
    assert summarize(results, {"all": ["a"], "none": ["z"]}, stages=2) == []


def test_draft_lengths_are_checked() -> None:
    assert [v.block for v in variants([1, 8])] == [None, None, 2, 9]
    with pytest.raises(ConfigError, match="gamma"):
        variants([0])


@pytest.fixture
def llm(tiny_model: Models) -> LLM:
    return LLM(
        str(tiny_model("llama")), stages=2, transport="inprocess", dtype="float32",
        head="untrained", mode="draft-then-verify", block=3,
    )  # fmt: skip


def test_variants_say_the_same_on_real_tasks(llm: LLM) -> None:
    with llm:
        chosen = variants([1, 2])
        bench = TaskBench(llm, chosen, TASKS, {GREEDY: PARAMS})
        results = Results(None, {}, {})
        run(interleaved([v.name for v in chosen], NAMES, 2), results, bench.measure)
    summaries = summarize(results, {"all": NAMES}, stages=2)
    assert [s.variant for s in summaries] == [v.name for v in chosen]
    assert all(s.differing == 0 and s.tasks == 2 for s in summaries)
    assert all(m.tokens > 0 for m in results.measurements.values())


def test_a_prompt_that_does_not_fit_is_named_before_anything_runs(llm: LLM) -> None:
    with llm, pytest.raises(PpsdError, match="task long: "):
        TaskBench(llm, variants([]), [Task("long", "", ({"role": "user", "content": "a" * 9999},))],
                  {GREEDY: PARAMS})  # fmt: skip


def test_outsiders_say_what_we_say(llm: LLM, tiny_model: Models) -> None:
    path = str(tiny_model("llama"))
    chosen = [
        Outsider("one process", kind="ppsd"),
        Outsider("transformers"),
        Outsider("lookup", options={"prompt_lookup_num_tokens": 2}),
    ]
    others = [OutsiderProcess(outsider, path, "float32", 1) for outsider in chosen]
    try:
        with llm:
            bench = BaselineBench(llm, variants([]), others, TASKS, PARAMS)
            plain = bench.measure(Cell(PLAIN, NAMES[1], 0))
            for outsider in chosen:
                found = bench.measure(Cell(outsider.name, NAMES[1], 0))
                assert found.details["output"] == plain.details["output"], outsider.name
                assert found.seconds > 0
    finally:
        for other in others:
            other.close()


def test_linears_alone_say_nothing_and_differ_in_nothing(llm: LLM, tiny_model: Models) -> None:
    other = OutsiderProcess(Outsider("linears", kind="linears"), str(tiny_model()), "float32", 1)
    try:
        with llm:
            bench = BaselineBench(llm, variants([]), [other], TASKS, PARAMS)
            results = Results(None, {}, {})
            run(interleaved([PLAIN, "linears"], NAMES, 1), results, bench.measure)
    finally:
        other.close()
    _, found = summarize(results, {"all": NAMES}, stages=2)
    assert (found.variant, found.differing) == ("linears", 0)
    assert results.get(Cell("linears", NAMES[0], 0)).tokens == PARAMS.max_tokens - 1


def test_an_outsider_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PpsdError, match=r"transformers ended with code 1:(.|\n)*Error"):
        OutsiderProcess(Outsider("transformers"), str(tmp_path / "nowhere"), "float32", 1)


def test_digests_tell_outputs_apart() -> None:
    assert digest([1, 23]) != digest([12, 3])


def test_gguf_files_need_accelerate_for_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(outsiders(1, gguf=False)) == 8
    assert len(outsiders(1, gguf=False, heads=True)) == 12
    with pytest.raises(PpsdError, match=r"accelerate; install it by .*\[lab\]"):
        outsiders(1, gguf=True)
