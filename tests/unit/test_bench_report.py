"""The report: real result files of a tiny model become a page whose numbers are theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.lab.report_plots import _trained
from tests.support.command import lab


@pytest.fixture
def results(tiny_model, tmp_path: Path) -> dict[str, Path]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    shared = ["--model", str(tiny_model()), "--transport", "inprocess", "--dtype", "float32"]
    oracle = ["--split", "2,4", "--tokens", "48", "--repeats", "2", "--alphas", "1,0.5"]
    real = ["--head", "untrained", "--prompts", str(prompts), "-n", "5"]
    commands = {
        "efficiency": [*shared, *oracle],
        "predict": [*shared, *oracle],
        "tasks": [*shared, *real, "--gammas", "1,2"],
    }
    found = {}
    for verb, flags in commands.items():
        result = lab(verb, *flags, "--json")
        assert result.exit_code == 0, result.output
        found[verb] = tmp_path / f"{verb}.json"
        found[verb].write_text(result.stdout)
    return found


def test_every_result_has_its_section_plot_and_origin(results, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lab("report", *results.values(), "--out", out)
    assert result.exit_code == 0, result.output
    page = (out / "report.md").read_text()
    for title in ("Pipeline efficiency", "Simulator against engine", "Tasks, with trained heads"):
        assert f"## {title}" in page
    for picture in ("efficiency.png", "tasks-tasks.png", "tasks-lengths.png"):
        assert f"({picture})" in page
        assert (out / picture).stat().st_size > 1000
    record = json.loads(results["efficiency"].read_text())
    assert f"| {record['rows'][0]['speedup']['median']:.3f}× |" in page
    assert record["label"] in page
    rows = json.loads(results["tasks"].read_text())["rows"]
    drafting = [r for r in rows if r["group"] != "all" and "draft" in r["variant"]]
    best = max(drafting, key=lambda row: row["ratio"])
    lines = [line for line in page.splitlines() if line.startswith(f"| {best['group']} |")]
    assert len(lines) == 1
    assert f"| γ={best['variant'][-1]} | {best['ratio']:.2f}× |" in lines[0]
    assert page.count(str(record["provenance"][0]["commit"])) == 3


def test_a_page_says_what_predictions_come_from(results, tmp_path: Path) -> None:
    record = json.loads(results["predict"].read_text())
    record["settings"]["verb"] += " by profile"
    profiled = tmp_path / "profiled.json"
    profiled.write_text(json.dumps(record))
    assert lab("report", results["predict"], profiled, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert page.count("## Simulator against engine") == 1
    assert page.index("stages, by its stage times") < page.index("stages, by profiles")


def test_exits_are_compared_where_nothing_else_differs(results, tmp_path: Path) -> None:
    pages = []
    for changes in ({}, {"max_tokens": 7}):
        record = json.loads(results["tasks"].read_text())
        record["bounds"][1] += 1
        record["settings"] |= changes
        other = tmp_path / f"other-{len(pages)}.json"
        other.write_text(json.dumps(record))
        assert lab("report", results["tasks"], other, "--out", tmp_path).exit_code == 0
        pages.append((tmp_path / "report.md").read_text())
    assert ["-exits.png" in page for page in pages] == [True, False]
    exits = [line.split(" | ")[0] for line in pages[0].splitlines() if "| untrained | ppsd" in line]
    first = json.loads(results["tasks"].read_text())["bounds"][1]
    assert exits == [f"| {first}", f"| {first + 1}"]


def test_results_are_named_when_they_are_none(results, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    for content in ("[]", "{", '{"settings": {}}'):
        wrong.write_text(content)
        result = lab("report", wrong, "--out", tmp_path / "out")
        assert "wrong.json is not the --json output of a benchmark" in str(result.exception)
    wrong.write_text('{"settings": {"verb": "tasks --virtual"}}')
    result = lab("report", wrong, "--out", tmp_path / "out")
    assert "wrong.json is of tasks --virtual, and a report shows only" in str(result.exception)
    trace = tmp_path / "trace.json"
    trace.write_text("{}")
    result = lab("report", results["tasks"], "--out", tmp_path / "out", "--trace", trace)
    assert "trace.json is not a trace" in str(result.exception)


def test_heads_are_listed_with_what_they_were_trained_on(tmp_path: Path) -> None:
    def head(exit_layer: int, tokens: int | None, alpha: float) -> dict[str, object]:
        return {
            "kind": "transformer", "exit_layer": exit_layer, "layers": 1, "lookup": True,
            "trained_tokens": tokens, "alpha": alpha, "interval": None, "top": {"4": 0.9},
            "expected": {"head_layers": 2.0, "speedup": 1.5, "paper": 1.7},
            "by_category": {"math": {"alpha": alpha}},
        }  # fmt: skip

    heads = {"little": head(8, 1_000, 0.5), "more": head(8, 4_000, 0.6), "none": head(9, None, 0.1)}
    assert list(_trained(list(heads.values()))) == [(8, [0.001, 0.004], [0.5, 0.6])]
    origin = {"commit": "abc", "command": "ppsd acceptance", "cpu": "a", "cores": 2}
    record = {
        "heads": heads,
        "first_right": {"shares": {"more": 1.0}},
        "provenance": origin | {"versions": {"torch": "2"}},
    }
    result = tmp_path / "acceptance.json"
    result.write_text(json.dumps(record))
    assert lab("report", result, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert "| more | 8 | 4,000 | 0.600 |" in page
    assert "| none | 9 | – | 0.100 |" in page
    assert (tmp_path / "acceptance-heads.png").stat().st_size > 1000


def test_results_of_the_same_name_keep_their_plots(results, tmp_path: Path) -> None:
    twin = tmp_path / "b" / "tasks.json"
    twin.parent.mkdir()
    record = json.loads(results["tasks"].read_text())
    twin.write_text(json.dumps(record | {"stages": 7}))
    assert lab("report", results["tasks"], twin, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    for name in ("tasks", "tasks-2"):
        assert page.count(f"({name}-tasks.png)") == 1
        assert (tmp_path / f"{name}-tasks.png").exists()


def test_trees_are_shown_by_task_and_by_exit(results, tmp_path: Path) -> None:
    """Their variants are called by their rows."""
    files = []
    for exit_layer in (2, 3):
        record = json.loads(results["tasks"].read_text())
        rows = [row for row in record["rows"] if "draft" not in row["variant"]]
        twice = [row | {"variant": "ppsd rows=4"} for row in rows if row["variant"] == "ppsd"]
        first = [row | {"variant": "ppsd rows=1"} for row in twice]
        record["rows"] = [row for row in rows if row["variant"] == "plain"] + first + twice
        record["bounds"][1] = exit_layer
        files.append(tmp_path / f"trees-{exit_layer}.json")
        files[-1].write_text(json.dumps(record))
    for chosen in (files[:1], files):
        assert lab("report", *chosen, "--out", tmp_path).exit_code == 0
    assert (tmp_path / "trees-2-exits.png").exists()
    assert lab("report", files[0], "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert [line for line in page.splitlines() if ", ppsd rows=4 |" in line]
