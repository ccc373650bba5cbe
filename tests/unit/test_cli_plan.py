"""The profile and plan commands, through the same entry point as the shell's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.errors import ConfigError
from ppsd.plan.model import Link
from ppsd.plan.profile import estimate
from ppsd.plan.sizes import Sizes
from tests.support.command import ppsd


def test_plan_lists_alternatives_for_named_shapes() -> None:
    options = ("--model", "vicuna-7b", "--hardware", "h100-nvlink", "--workers", 4)
    result = ppsd("plan", *options, "--alpha", "4:0.6,8:0.8", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    best = record["plans"][0]
    assert record["source"] == "prediction: vicuna-7b on h100-nvlink"
    assert (best["mode"], best["exit_layer"], best["bitwise"]) == ("ppsd", 8, True)
    assert best["split"] == [8, 17, 26]  # the draft and the LM head are worth a layer each
    assert 1 < best["speedup"] < best["bound"] < 4
    assert len(best["memory_bytes"]) == len(best["stage_ms"]) == 4
    assert best["tokens_per_second"] == pytest.approx(1e3 / best["ms_per_token"])
    assert {p["exit_layer"] for p in record["plans"]} == {None, 4, 8}
    shown = ppsd("plan", *options, "--alpha", "4:0.6,8:0.8", "--top", 3).stdout
    assert "Best: --split 8,17,26 --mode ppsd" in shown
    assert shown.count("bit for bit") >= 2


def test_plan_says_when_speculation_does_not_pay() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink")
    assert "Speculation will not pay" in ppsd(*options, "--alpha", "16:0.0").stdout
    assert "No head, no speculation" in ppsd(*options).stdout


def test_plan_takes_odd_workers_and_links() -> None:
    options = ("plan", "--model", "llama-3-8b", "--hardware", "pcie-consumer", "--json")
    even, odd, far = (
        json.loads(ppsd(*options, *more).stdout)["plans"][0]
        for more in ((), ("--worker-speed", "1,0.25"), ("--link-ms", "20"))
    )
    assert odd["split"][0] > even["split"][0]
    assert far["ms_per_token"] == pytest.approx(even["ms_per_token"] + 40, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "8=0.5"], "alpha must be exit:rate pairs"),
        (["--alpha", "40:0.5"], r"alpha must be for exits in \[1, 31\]"),
        (["--alpha", "8:1.5"], "alpha must be a rate"),
        (["--worker-speed", "1,fast"], "worker_speed must be numbers separated by commas"),
        (["--worker-speed", "1"], "worker_speed must be 2 numbers above 0"),
        (["--link-ms", "1,2,3"], "link_ms must be one hop, or 2"),
        (["--link-ms", "-1"], "link_ms must be a number of at least 0, got -1"),
        (["--workers", "33"], r"workers must be an integer in \[1, 32\]"),
        (["--split", "9,5", "--workers", "3"], "split must be ascending layers"),
        (["--mode", "fast"], "mode must be one of autoregressive"),
        (["--mode", "ppsd"], "mode must be one that the heads and the split allow"),
        (["--profile", "x.json"], "profile must be left out with --hardware"),
        (["--context", "-1"], "context must be at least 0"),
    ],
)
def test_bad_plans_are_refused_by_name(arguments: list[str], message: str) -> None:
    result = ppsd("plan", "--model", "vicuna-7b", "--hardware", "wan", *arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def test_profile_then_plan(tiny_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path))
    monkeypatch.setattr("ppsd.engine.profiler.REPEATS", 2)
    monkeypatch.setattr("ppsd.engine.profiler.PINGS", 2)
    model = ("--model", tiny_model(), "--dtype", "float32", "--threads-per-stage", 1)
    printed = json.loads(ppsd("profile", *model, "--json").stdout)
    [written] = (tmp_path / "profiles").iterdir()
    assert json.loads(written.read_text()) == printed
    assert printed["provenance"]["versions"]["torch"]
    assert written.name == f"{printed['fingerprint'][:16]}-float32-1-threads.json"
    record = json.loads(ppsd("plan", *model, "--alpha", "2:0.7", "--json").stdout)
    assert record["source"] == "measured profile, taken today"
    elsewhere = tmp_path / "elsewhere.json"
    table = ppsd("profile", *model, "--out", elsewhere).stdout
    assert "exit head (norm), 300 tokens" in table
    shown = ppsd("plan", *model, "--profile", elsewhere, "--alpha", "2:0.7").stdout
    assert "times: measured profile" in shown


def test_a_profile_of_a_model_that_is_not_here_is_planned_with(tmp_path: Path) -> None:
    sizes = Sizes(32, 4096, 14336, 128_256, 218_112_000, 2048, 525_336_576, False)
    file = tmp_path / "far.json"
    about = {"model": "far away", "fingerprint": "0" * 64, "source": "elsewhere"}
    estimate(sizes, 2, 3e12, Link(1e-5, 1e10), **about).save(file)
    flags = ("--profile", file, "--workers", 4, "--alpha", "8:0.7")
    record = json.loads(ppsd("plan", *flags, "--json").stdout)
    assert record["source"] == "elsewhere"
    assert record["plans"][0]["split"][0] == 8
    assert len(record["plans"][0]["stage_ms"]) == 4
