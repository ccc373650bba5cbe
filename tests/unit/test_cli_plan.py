"""The profile and plan commands, through the same entry point as the shell's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppsd.config import DEFAULT_CONTEXT
from ppsd.errors import ConfigError
from ppsd.model.head_files import record_metrics
from ppsd.model.source import describe, resolve_model
from ppsd.plan.model import Link
from ppsd.plan.presets import Hardware, find_shape
from ppsd.plan.profile import estimate
from ppsd.plan.sizes import Sizes
from tests.support.command import ppsd
from tests.support.tiny_models import save_perfect_head

CONFIG = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
          "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip


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


def test_plan_shows_what_is_chosen_unless_more_is_asked_for() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink", "--alpha", "4:0.9")
    first, chosen = ppsd(*options, "--top", 1).stdout.splitlines()[1:3]
    assert "up to rounding" in first
    assert "bit for bit" in chosen


def test_plan_says_when_speculation_does_not_pay() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink")
    assert "Speculation will not pay" in ppsd(*options, "--alpha", "16:0.0").stdout
    assert "No head, no speculation" in ppsd(*options).stdout


def test_plan_names_the_best_once_where_none_is_bitwise() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink", "--workers", 4)
    for more in (("--mode", "draft-then-verify"), ("--block", 4)):
        verdict = json.loads(ppsd(*options, "--alpha", "8:0.9", *more, "--json").stdout)["verdict"]
        assert verdict.endswith(" times plain decoding, equal up to rounding.")
        assert verdict.count("--split") == 1
        assert "bit for bit" not in verdict


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("", "No head, no speculation: train one"),
        ("--workers 1 --alpha 8:0.8", "One worker, no speculation"),
        ("--mode autoregressive --alpha 8:0.8", "No speculation: plain decoding was asked for"),
        ("--block 1 --in-flight 1 --alpha 8:0.8", "No speculation: plain decoding was asked for"),
        ("--exit-layer 9 --alpha 8:0.8", "stage 0 ends at layer 9, and heads are for exits in [8]"),
        ("--split 9 --alpha 8:0.8", "stage 0 ends at layer 9, and heads are for exits in [8]"),
        ("--workers 4 --alpha 31:0.8", "stage 0 ends at a layer in [1, 29], and heads are for"),
    ],
)
def test_plan_says_why_nothing_is_drafted(flags: str, reason: str) -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink", "--json")
    assert reason in json.loads(ppsd(*options, *flags.split()).stdout)["verdict"]


def test_a_split_gives_the_number_of_workers() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink", "--json")
    [plan] = json.loads(ppsd(*options, "--split", "8,17,26").stdout)["plans"]
    assert plan["split"] == [8, 17, 26]
    assert len(plan["stage_ms"]) == 4


def test_predictions_count_the_bytes_of_the_dtype_and_the_positions_of_the_model() -> None:
    options = ("plan", "--model", "vicuna-7b", "--hardware", "h100-nvlink", "--json")
    half, single = (
        json.loads(ppsd(*options, *more).stdout)["plans"][0]
        for more in ((), ("--dtype", "float32"))
    )
    assert single["ms_per_token"] == pytest.approx(2 * half["ms_per_token"], rel=0.01)
    sizes = find_shape("vicuna-7b").sizes
    bounds = (0, *half["split"], 32)
    assert half["memory_bytes"] == [sizes.stage_bytes(bounds, k, 2, 4096) for k in (0, 1)]


def test_a_model_that_is_here_is_predicted_with_its_heads(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path / "heads"))
    model = tiny_model("llama")
    head = save_perfect_head(tmp_path / "heads" / "own", model, 2)
    record_metrics(head, "acceptance", {"alpha": 0.9})
    slow = Hardware("slow", 1e8, Link(), "assumed")
    monkeypatch.setattr("ppsd.plan.presets.HARDWARE", (slow,))
    shown = ppsd("plan", "--model", model, "--hardware", "slow", "--json")
    record = json.loads(shown.stdout)
    assert {plan["alpha"] for plan in record["plans"] if plan["head"] == str(head)} == {0.9}
    spec = describe(resolve_model(str(model)))
    plain = next(plan for plan in record["plans"] if plan["exit_layer"] is None)
    bounds = (0, *plain["split"], spec.num_layers)
    assert spec.max_context < DEFAULT_CONTEXT
    assert plain["memory_bytes"] == [
        Sizes.of(spec).stage_bytes(bounds, k, 2, spec.max_context) for k in (0, 1)
    ]
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text((model / "config.json").read_text())
    alone = json.loads(ppsd("plan", "-m", shape, "--hardware", "slow", "--json").stdout)
    assert {plan["head"] for plan in alone["plans"]} == {None}


def test_brackets_in_a_path_are_shown_as_they_are(tmp_path: Path) -> None:
    place = tmp_path / "llama[v2]" / "a[" / "b]"
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(CONFIG))
    result = ppsd("plan", "--model", place, "--hardware", "wan")
    assert result.exit_code == 0, result.output
    assert str(place) in result.stdout


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
        (["--threads-per-stage", "2"], "threads_per_stage must be left out with --hardware, got 2"),
        (["--dtype", "float8"], "dtype must be one of auto, float64"),
        (["--alpha", "8:0.8,8:0.1"], "alpha must be exit:rate pairs with each exit once"),
        (["--split", "8", "--workers", "4"], r"split must be 3 layers, .*, got 8"),
        (["--split", "10", "--exit-layer", "8"], "exit_layer must be the end of stage 0, 10 in"),
        (["--context", "-1"], "context must be at least 0"),
    ],
)
def test_bad_plans_are_refused_by_name(arguments: list[str], message: str) -> None:
    result = ppsd("plan", "--model", "vicuna-7b", "--hardware", "wan", *arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def test_a_profile_is_of_as_many_stages_as_the_model_has_layers_at_most(tiny_model) -> None:
    with pytest.raises(ConfigError, match=r"stages must be an integer in \[1, 6\], got 7$"):
        raise ppsd("profile", "--model", tiny_model(), "--stages", 7).exception


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
    assert "layer, 1 row, context" in table
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
    for name, value in (("dtype", "float32"), ("threads-per-stage", "2")):
        refused = ppsd("plan", *flags, f"--{name}", value)
        told = f"{name.replace('-', '_')} must be left out with --profile and --alpha"
        assert str(refused.exception).startswith(told)
