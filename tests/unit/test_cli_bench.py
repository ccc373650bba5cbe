"""``ppsd-lab`` on a tiny model: flags, labels, files, tables, and what it refuses."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ppsd.engine.llm import LLM
from ppsd.errors import ConfigError, PpsdError
from tests.support.command import lab


@pytest.fixture
def small(tiny_model) -> list[str]:
    """Flags of a pipeline of three tiny stages, and of a short measurement."""
    pipeline = f"--model {tiny_model()} --split 2,4 --dtype float64 --transport inprocess"
    return f"{pipeline} --tokens 9 --repeats 2 --alphas 1,0.5".split()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("pack my box\n")
    return path


@pytest.mark.parametrize("transport", ["inprocess", "shared-memory"])
def test_efficiency_as_json(small, tmp_path, transport) -> None:
    out = tmp_path / "m.jsonl"
    flags = ["--json", "--out", out, "--pace", "0.003", "--transport", transport]
    result = lab("efficiency", *small, *flags)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["label"].startswith("ORACLE drafts")
    assert "PACED: emulated stages of 0.003 s" in record["label"]
    assert (record["stages"], record["bounds"], record["repeats"]) == (3, [0, 2, 4, 6], 2)
    assert (record["pace"], record["blocks"] > 0) == ([0.003], True)
    assert (record["memory"], record["kept"]) == ("any", 6)
    assert record["provenance"][0]["config"]["pace"] == [0.003]
    assert [row["variant"] for row in record["rows"]] == ["ppsd α=1", "ppsd α=0.5"]
    for row in record["rows"]:
        assert row["token_time"] == pytest.approx(sum(row["budget"].values()))
        assert row["of_paper"]["median"] > 0
        assert row["budget"]["other"] == 0
    assert record["rows"][0]["alpha"]["median"] == 1
    assert all(times["median"] >= 0.003 for times in record["plain"]["stage_times"])
    assert len(out.read_text().splitlines()) == 1 + 2 * 3


def test_a_finished_file_is_shown_again_and_more_repeats_are_added(small, tmp_path) -> None:
    flags = [*small, "--json", "--out", tmp_path / "m.jsonl"]
    first = json.loads(lab("efficiency", *flags).stdout)
    again = json.loads(lab("efficiency", *flags).stdout)
    assert (again["rows"], again["plain"]) == (first["rows"], first["plain"])
    more = json.loads(lab("efficiency", *flags, "--repeats", 3).stdout)
    assert (more["repeats"], more["rows"][0]["speedup"]["count"]) == (3, 3)
    other = lab("efficiency", *flags, "--tokens", 8)
    assert "holds measurements of other settings" in str(other.exception)


def test_predict_runs_all_modes(small) -> None:
    result = lab("predict", *small, "--block", 3, "--json")
    assert result.exit_code == 0, result.output
    rows = {row["variant"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == [
        "plain",
        "draft-then-verify α=1",
        "ppsd α=1",
        "draft-then-verify α=0.5",
        "ppsd α=0.5",
    ]
    for row in rows.values():
        assert row["predicted"]["median"] > 0
        assert row["error"]["count"] == 2


@pytest.mark.parametrize("verb", ["efficiency", "predict"])
def test_tables_carry_their_label(small, verb, tmp_path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the quick\nbrown fox\n")
    result = lab(verb, *small, "--repeats", 1, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == ("ORACLE drafts: acceptance is chosen, not a head's · 3 stages at 0,2,4,6")
    assert any(line.startswith("ppsd α=1 " if verb == "predict" else "1.000 ") for line in lines)


def test_a_reader_that_comes_late_changes_no_measurement(small, monkeypatch) -> None:
    stream = LLM.stream

    def late(*arguments):
        """Read nothing before all of it is there."""
        parts, complete = [], None
        source = stream(*arguments)
        while complete is None:
            try:
                parts.append(next(source))
            except StopIteration as stop:
                complete = stop.value
        yield from parts
        return complete

    monkeypatch.setattr(LLM, "stream", late)
    record = json.loads(lab("predict", *small, "--pace", "0.003", "--json").stdout)
    plain = record["rows"][0]["measured"]
    assert plain["median"] >= 3 * 0.003


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--stages", "1"], "stages must be at least 2, got 1"),
        (["--alphas", "2"], "alphas must be rates in [0, 1] separated by commas, got '2'"),
        (["--alphas", "x"], "alphas must be numbers separated by commas, got 'x'"),
        (["--memory", "x"], "memory must be one of any, own, shared, got 'x'"),
        (["--pace", "x"], "pace must be numbers separated by commas, got 'x'"),
        (["--out", "/no/where/m"], "out must be a file in a directory that exists"),
        (["--prompts", "/no/where"], "cannot read prompts from /no/where"),
        (["--tokens", "0"], "tokens must be in [1, "),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--alphas", "1,1"], "variants must be different from one another"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_model, arguments, cause) -> None:
    flags = ["--model", str(tiny_model()), "--dtype", "float64", "--transport", "inprocess"]
    error = lab("efficiency", *flags, *arguments).exception
    assert isinstance(error, PpsdError)
    assert str(error).startswith(cause)


def test_the_gate_is_off_but_where_it_is_measured(small, tmp_path) -> None:
    out = tmp_path / "m.jsonl"
    record = json.loads(lab("efficiency", *small, "--alphas", "1,0", "--json", "--out", out).stdout)
    assert [row["variant"] for row in record["rows"]] == ["ppsd α=1", "ppsd α=0"]
    assert list(record["gated"]) == ["ppsd gated α=0"]
    measured = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    pauses = {m["variant"]: m["details"]["pauses"] for m in measured}
    assert {name for name, count in pauses.items() if count is not None} == {"ppsd gated α=0"}


def test_all_modes_run_where_ppsd_would_be_cut(tiny_model, tmp_path) -> None:
    """Draft-then-verify alone would cut this model after its first layer."""
    flags = ["--model", tiny_model(), "--dtype", "float64", "--stages", 3, "--transport"]
    short = ["inprocess", "--tokens", 24, "--repeats", 1, "--alphas", 1, "--json"]
    verbs = ("efficiency", "predict")
    results = [lab(verb, *flags, *short) for verb in verbs]
    assert [result.exit_code for result in results] == [0, 0], results
    one, two = [json.loads(result.stdout)["bounds"] for result in results]
    assert one == two
    assert one[1] > 1


def test_predict_takes_a_profile_between_any_two_requests(tiny_model, tmp_path) -> None:
    pipeline = ["--model", tiny_model(), "--dtype", "float64", "--stages", 2]
    short = ["--tokens", 8, "--repeats", 2, "--alphas", 1, "--json", "--profile"]
    out = tmp_path / "runs.jsonl"
    made = lab("predict", *pipeline, *short, "--out", out)
    assert made.exit_code == 0, repr(made.exception)
    found = json.loads(made.stdout)
    assert found["source"] == "profiles taken in between"
    assert all(row["predicted"]["median"] > 0 for row in found["rows"])
    runs = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    before, after = zip(*(run["details"]["profiles"] for run in runs), strict=True)
    assert before[1:] == after[:-1]
    assert len({json.dumps(profile["layer"]) for profile in (*before, after[-1])}) == len(runs) + 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--transport", "distributed"], "transport"),
        (["--devices", "cuda"], "devices"),
    ],
)
def test_a_profile_says_nothing_of_other_pipelines(flags, field) -> None:
    error = lab("predict", *flags, "--profile").exception
    assert isinstance(error, ConfigError)
    assert error.field == field


def test_other_prompts_of_the_same_names_are_not_gone_on_with(small, tmp_path, prompts) -> None:
    flags = [*small, "--prompts", prompts, "--out", tmp_path / "m.jsonl", "--json"]
    assert lab("efficiency", *flags).exit_code == 0
    assert lab("efficiency", *flags).exit_code == 0
    prompts.write_text("five dozen jugs\n")
    told = str(lab("efficiency", *flags).exception)
    assert told.endswith("m.jsonl holds measurements of other settings (asked)")


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tiny_model, tmp_path, prompts, monkeypatch
) -> None:
    monkeypatch.setattr(LLM, "run", None)
    pipeline = f"--model {tiny_model()} --split 3 --head untrained --transport inprocess".split()
    for out in ("/proc/nope", tmp_path):
        error = lab("load", *pipeline, "--prompts", prompts, "--out", out).exception
        assert isinstance(error, ConfigError)
        assert error.field == "out"


def test_gated_requests_alone_are_shown_without_the_others(small, tmp_path) -> None:
    """Where no other had the memory that counts."""
    out = tmp_path / "m.jsonl"
    assert lab("efficiency", *small, "--alphas", "0.1,1", "--out", out).exit_code == 0
    head, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert any("gated" in line["variant"] for line in lines)
    for line in lines:
        own = "gated" in line["variant"] or line["variant"] == "plain"
        line["details"]["memory"] = [1.0, 1.0] if own else [0.1, 0.1]
    out.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    result = lab("efficiency", *small, "--alphas", "0.1,1", "--out", out, "--memory", "own")
    assert result.exit_code == 0, result.output
    assert "ppsd gated" in result.stdout


def test_an_interrupted_load_does_not_wait_for_answers(tiny_model, prompts, monkeypatch) -> None:
    begun, run = threading.Event(), LLM.run
    answered: list[object] = []

    def noted(self, ids, params):
        if threading.current_thread() is threading.main_thread():
            return run(self, ids, replace(params, max_tokens=1))  # what plain decoding says alone
        begun.set()
        answered.append(run(self, ids, params))
        return answered[-1]

    def interrupted(self, fn, items):
        for item in items:
            self.submit(fn, item)
        begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "run", noted)
    monkeypatch.setattr(ThreadPoolExecutor, "map", interrupted)
    flags = f"--model {tiny_model()} --split 3 --head untrained --transport inprocess --pace 0.05"
    result = lab("load", *flags.split(), "--prompts", prompts, "-n", 400, "--concurrent", 1)
    assert result.exit_code == 130
    assert begun.is_set()
    assert not answered
