"""Requests are told apart by the memory that the stages' cores had."""

from __future__ import annotations

import os

import pytest

from ppsd.errors import PpsdError
from ppsd.lab import memory
from ppsd.lab.memory import label, memory_of, noted, probe_of, with_memory
from ppsd.lab.runner import Cell, Measurement, Results

SHARES = [(1.0, 0.95), (0.89, 1.0), (0.6, 0.7), (None, None)]


def measurement(variant: str, repeat: int, shares: tuple[float | None, float | None]):
    counts = {"judged": 1, "accepted": 1}
    details = {"memory": list(shares)}
    return Measurement(variant, "x", repeat, 1, 1.0, 1.0, counts, "1", details)


@pytest.fixture
def results() -> Results:
    """One plain and one PPSD request with each of SHARES."""
    found = Results(None, {}, {"of": "all"})
    for repeat, shares in enumerate(SHARES):
        found.add(measurement("plain", repeat, (None, None)))
        found.add(measurement("ppsd", repeat, shares))
    return found


def test_requests_are_kept_by_their_memory_and_the_baseline_always(results: Results) -> None:
    def kept(kind: str) -> list[int]:
        some = with_memory(results, kind)
        assert some.provenance == results.provenance
        found = [cell.repeat for cell in some.measurements if cell.variant == "ppsd"]
        assert len(some) == len(SHARES) + len(found)
        return found

    assert (kept("any"), kept("own"), kept("shared")) == ([0, 1, 2, 3], [0], [2])
    kinds = [memory_of(m) for m in results.measurements.values() if m.variant == "ppsd"]
    assert kinds == ["own", "mixed", "shared", None]
    with pytest.raises(PpsdError, match="no request but plain ones had own memory"):
        with_memory(results.only(lambda m: m.variant == "plain" or m.repeat == 2), "own")


def test_the_label_counts_what_is_known(results: Results) -> None:
    assert label(results, "own") == "memory of requests: 1 mixed, 1 own, 1 shared; own counts"
    assert label(results.only(lambda m: m.repeat == 3), "any") == ""


def test_memory_is_noted_around_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class Probe:
        def share(self) -> float:
            events.append("look")
            return float(len(events))

    def measure(cell: Cell) -> Measurement:
        events.append(cell)
        return measurement(*cell[::2], (None, None))

    monkeypatch.setattr(memory, "probe_of", lambda cores: Probe())
    cell = Cell("ppsd", "x", 0)
    assert noted(measure, [[0], [1]])(cell).details["memory"] == [1.0, 3.0]
    assert events == ["look", cell, "look"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen")
def test_memory_is_read_by_the_cores_asked_for() -> None:
    mine = os.sched_getaffinity(0)
    cores = sorted(mine)[:2]
    probe = probe_of([[core] for core in cores])
    assert probe is not None
    rates = probe._rates(cores)
    assert sorted(rates) == cores
    assert min(rates.values()) > 0
    assert probe.share() > 0
    assert os.sched_getaffinity(0) == mine  # its threads' cores are not ours


def test_stages_that_stay_on_no_cores_have_no_memory_to_look_at() -> None:
    assert probe_of([[], []]) is None
    assert probe_of([[0], []]) is None
    unknown = noted(lambda cell: measurement(*cell[::2], (1.0, 1.0)), [[], []])
    assert unknown(Cell("ppsd", "x", 0)).details["memory"] == [None, None]
