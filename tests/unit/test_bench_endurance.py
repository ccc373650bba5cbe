"""Late tokens and many requests: windows and ratios by hand, and memory that stays flat."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace

import pytest

from ppsd import LLM
from ppsd.errors import ConfigError
from ppsd.lab import endurance
from ppsd.lab.oracle import WINDOW, end_times
from ppsd.lab.runner import PLAIN, Measurement, Results
from ppsd.model.source import describe, resolve_model
from ppsd.model.weights import fingerprint, open_source
from ppsd.plan.model import Link
from ppsd.plan.profile import LayerTime, RowsTime, Timing, estimate
from ppsd.plan.sizes import Sizes
from ppsd.speculation.policy import Schedule
from tests.support.command import lab

SIZES = Sizes(layers=6, hidden=8, inner=2, vocabulary=9, layer=50, cached=8, lm_head=72, tied=True)
FLAT = 2 * 2**20  # bytes a process may gain by chance: an arena, a thread's stack


def test_windows_at_both_ends() -> None:
    early, late = 3_000_000_000, 5_000_000_000
    arrivals = [early * i for i in range(WINDOW + 1)]
    arrivals += [arrivals[-1] + 7, *(arrivals[-1] + 7 + late * (i + 1) for i in range(WINDOW))]
    assert end_times(arrivals) == pytest.approx((3.0, 5.0))
    assert end_times(range(2 * WINDOW)) is None


def test_what_the_context_explains() -> None:
    """Layers of 1 ms at context 0 and 2 ms at 1000; an LM head of 6 ms."""
    layer = (LayerTime(0, 1, Timing.computed(1e-3)), LayerTime(1000, 1, Timing.computed(2e-3)))
    head = (RowsTime(1, Timing.computed(6e-3)),)
    profile = replace(estimate(SIZES, link=Link()), layer=layer, lm_head=head)
    found = endurance.explained(profile, (0, 3, 6), {PLAIN: Schedule(1, 1)}, 100, 800)
    early, late = (1 + (100 + WINDOW // 2) / 1000), (1 + (900 - WINDOW // 2) / 1000)
    assert found[PLAIN] == pytest.approx((6 * late + 6) / (6 * early + 6))


def test_drift_is_what_the_context_leaves_over() -> None:
    results = Results(None, {}, {})
    for repeat in range(3):
        details = {"ends": [0.02, 0.03]}
        results.add(Measurement(PLAIN, "x", repeat, 200, 5.0, 1.0, {}, "", details))
    [row] = endurance.drifts(results, {PLAIN: 1.2})
    assert (row.ratio.median, row.beyond) == (pytest.approx(1.5), pytest.approx(0.25))
    results.add(Measurement(PLAIN, "y", 0, 20, 5.0, 1.0, {}, "", {"ends": None}))
    with pytest.raises(ConfigError, match="tokens must be above 128"):
        endurance.drifts(results, {PLAIN: 1.2})


def test_memory_is_flat_over_a_hundred_requests(tiny_model) -> None:
    settings = {"stages": 3, "head": "untrained", "mode": "ppsd", "plan": "off", "gate": False}
    with LLM(str(tiny_model()), threads_per_stage=1, trace=True, **settings) as llm:
        found = endurance.memory(llm, list(range(3, 20)), 100)
    assert len(found.resident) == 100
    assert len(found.growth) == 3
    assert max(found.growth) < FLAT, found.growth


def test_a_leak_shows(tiny_model) -> None:
    """In pages of its own: what malloc gives may be memory that was freed and is still resident."""
    piece, kept = 40 * 2**20, []

    def leak(done: int) -> None:
        if done > 10:
            kept.append(mmap.mmap(-1, piece))
            kept[-1].write(bytes(piece))

    with LLM(str(tiny_model()), stages=1, threads_per_stage=1, head="none", plan="off") as llm:
        found = endurance.memory(llm, list(range(3, 20)), 13, leak)
    assert found.growth[0] > piece


def test_a_run(tiny_model, tmp_path) -> None:
    pipeline = f"--model {tiny_model()} --stages 2 --threads-per-stage 1 --dtype float64".split()
    files = resolve_model(str(tiny_model()))
    spec = describe(files)
    profile = estimate(
        Sizes.of(spec),
        8,
        1e9,
        Link(1e-5, 1e9),
        fingerprint=fingerprint(spec, open_source(files.path)),
    )
    replace(profile, dtype="float64", measured=True, kernels="PyTorch").save(tmp_path / "p.json")
    short = ["--tokens", 140, "--repeats", 1, "--requests", 12, "--plan", tmp_path / "p.json"]
    found = lab("endurance", *pipeline, *short, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert [row["variant"] for row in record["drift"]] == [PLAIN, "ppsd α=1"]
    assert [len(record["memory"]["resident"]), len(record["memory"]["growth"])] == [12, 2]
    (tmp_path / "long.json").write_text(found.stdout)
    assert lab("report", tmp_path / "long.json", "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert f"| {record['drift'][1]['beyond']:+.1%} |" in page
    assert "Memory over 12 requests" in page
    assert "memory over 12 requests: stage 0" in lab("endurance", *pipeline, *short).stdout


def test_bad_input(tiny_model) -> None:
    pipeline = f"--model {tiny_model()} --stages 2 --transport inprocess --repeats 1".split()
    error = lab("endurance", *pipeline, "--tokens", "128").exception
    assert isinstance(error, ConfigError)
    assert error.field == "plan"  # there is no profile
    error = lab("endurance", *pipeline, "--tokens", "127").exception
    assert isinstance(error, ConfigError)
    assert (error.field, error.allowed) == ("tokens", "at least 128, for two windows")
