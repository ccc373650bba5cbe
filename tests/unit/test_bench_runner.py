"""The runner: interleaving, files that are continued, and numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.errors import ConfigError, PpsdError
from ppsd.lab import runner
from ppsd.lab.runner import Cell, Measurement, Results, interleaved, pairs, spread

SETTINGS = {"verb": "test", "bounds": (0, 2)}


def measurement(cell: Cell, seconds: float = 2.0) -> Measurement:
    counts = {"judged": 4, "accepted": 3}
    return Measurement(*cell, 4, seconds, 0.5, counts, "11100", {"overruns": 1})


def open_results(path: Path | None, settings=SETTINGS) -> Results:
    return Results(path, settings, {"commit": "abc"})


def test_every_other_repeat_runs_backwards() -> None:
    cells = interleaved(["a", "b"], ["x", "y"], 2)
    assert " ".join(cell.variant + cell.task for cell in cells) == "ax bx ay by bx ax by ay"
    assert [cell.repeat for cell in cells] == [0] * 4 + [1] * 4
    with pytest.raises(ConfigError, match=r"^repeats must be at least 1, got 0"):
        interleaved(["a"], ["x"], 0)
    with pytest.raises(ConfigError, match=r"^tasks must be different from one another, got "):
        interleaved(["a"], ["x", "x"], 1)


def test_rates() -> None:
    one = measurement(Cell("a", "x", 0))
    assert (one.token_time, one.alpha) == (0.5, 0.75)
    assert Measurement("a", "x", 0, 4, 2.0, 0.5, {"judged": 0}, "00000").alpha == 0


def test_a_spread_is_median_and_quartiles() -> None:
    assert spread([5.0]) == runner.Spread(5, 5, 5, 1)
    assert spread([4.0, 1, 3, 2, 5]) == runner.Spread(3, 2, 4, 5)
    assert spread([1.0, 2]) == runner.Spread(1.5, 1.25, 1.75, 2)


@pytest.mark.parametrize("torn", ["", '{"variant": "b", "ta'])
def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, torn) -> None:
    path, cells = tmp_path / "m.jsonl", interleaved(["a", "b"], ["x"], 3)
    measured: list[Cell] = []

    def measure(cell: Cell) -> Measurement:
        if len(measured) == 4 and not torn_written:
            raise KeyboardInterrupt
        measured.append(cell)
        return measurement(cell, float(len(measured)))

    torn_written = False
    with pytest.raises(KeyboardInterrupt):
        runner.run(cells, open_results(path), measure)
    with path.open("a") as file:
        file.write(torn)
    torn_written = True
    done: list[Cell] = []
    results = open_results(path)
    runner.run(cells, results, measure, done.append)
    assert measured == done == cells, "each was measured once, and progress counts all"
    assert [results.get(cell).seconds for cell in cells] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert ["variant" in line for line in lines] == [False] + [True] * 4 + [False] + [True] * 2
    assert lines[0] == {"settings": {**SETTINGS, "bounds": [0, 2]}, "provenance": {"commit": "abc"}}
    assert lines[5] == {"provenance": {"commit": "abc"}}
    again = open_results(path)
    assert (again.measurements, again.provenance) == (results.measurements, results.provenance)
    assert len(path.read_text().splitlines()) == 8, "only to look adds nothing"
    assert open_results(None).measurements == {}


def test_a_file_of_other_settings_is_left_alone(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    open_results(path).add(measurement(Cell("a", "x", 0)))
    before = path.read_text()
    with pytest.raises(PpsdError, match=r"m\.jsonl holds measurements of other settings"):
        open_results(path, {"verb": "other"})
    assert path.read_text() == before


@pytest.mark.parametrize("length", [0, 5, 30])
def test_a_file_that_was_cut_off_in_its_first_line_is_begun_anew(tmp_path, length: int) -> None:
    path = tmp_path / "m.jsonl"
    open_results(path)
    whole = path.read_text()
    path.write_text(whole[:length])
    open_results(path)
    assert path.read_text() == whole


HEAD = json.dumps({"settings": {**SETTINGS, "bounds": [0, 2]}, "provenance": {}}) + "\n"


@pytest.mark.parametrize("text", ["nonsense\n", "a note", "[1]\n", "{}\n", HEAD + '{"a": 1}\n{'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path, text) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(PpsdError, match=r"m\.jsonl is no file of measurements: "):
        open_results(path)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(PpsdError, match=r"cannot write measurements to .*missing"):
        open_results(tmp_path / "missing" / "m.jsonl")


def test_pairs_join_a_variant_with_the_baseline_of_the_same_task_and_repeat() -> None:
    results = open_results(None)
    for cell in [("a", "x", 0), ("a", "x", 1), ("a", "y", 0), ("b", "x", 1), ("b", "y", 0)]:
        results.add(measurement(Cell(*cell)))
    found = [(one.cell, two.cell) for one, two in pairs(results, "a", "b")]
    assert found == [
        (Cell("a", task, repeat), Cell("b", task, repeat)) for task, repeat in [("x", 1), ("y", 0)]
    ]
    assert runner.total(results, "overruns") == 5
