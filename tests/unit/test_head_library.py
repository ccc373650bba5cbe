"""Finding heads, choosing the best for model and exit, and plain decoding without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppsd import LLM, SamplingParams
from ppsd.config import EngineConfig
from ppsd.engine.choose import choose
from ppsd.errors import ConfigError
from ppsd.lab.oracle import OracleDrafter
from ppsd.model import head_library
from ppsd.model.head_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    HeadConfig,
    record_metrics,
    save_head,
)
from ppsd.model.head_library import Rate, find_heads, known_rate, suitable
from ppsd.model.identity import Identity
from ppsd.model.source import describe, resolve_model
from ppsd.model.spec import ModelSpec
from ppsd.model.weights import open_source
from ppsd.plan.planner import LEAST_GAIN
from ppsd.speculation.policy import Schedule
from tests.support.command import ppsd
from tests.support.tiny_models import save_perfect_head


@pytest.fixture
def spec(tiny_model: Callable[[str], Path]) -> ModelSpec:
    return describe(resolve_model(str(tiny_model("llama"))))


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_library, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path / "local"))
    monkeypatch.setattr("ppsd.engine.choose.available_cores", lambda: [0, 1])  # wherever it runs


def put(place: Path, exit_layer: int, alpha: float | None, **changes: object) -> None:
    metrics = {} if alpha is None else {"validation": {"alpha": alpha}}
    config = HeadConfig("norm", exit_layer, 0, None, "tiny", "mark", metrics=metrics)
    save_head(place, replace(config, **changes), {"norm.weight": torch.ones(4)})


def test_shipped_and_local_heads_are_found_and_damage_is_told(tmp_path: Path) -> None:
    put(tmp_path / "shipped" / "a", 2, 0.5)
    put(tmp_path / "local" / "run" / "b", 3, None)
    put(tmp_path / "local" / ".c.new", 3, None)
    put(tmp_path / "local" / "d", 3, None)
    (tmp_path / "local" / "d" / CONFIG_FILE).write_text("{")
    put(tmp_path / "local" / "e", 3, 0.9)
    weights = tmp_path / "local" / "e" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    found = find_heads()
    assert [(h.path.name, h.shipped, h.rate) for h in found] == [
        ("a", True, Rate(0.5, measured=False)),
        ("d", False, None),
        ("e", False, None),
        ("b", False, None),
    ]
    assert "is not a head configuration" in found[1].problem
    assert f"cannot read {weights}" in found[2].problem


def test_decoding_says_more_of_a_head_than_training() -> None:
    config = HeadConfig("norm", 2, 0, None, "tiny", "mark")
    assert known_rate(config) is None
    trained = replace(config, metrics={"validation": {"alpha": 0.6}})
    assert known_rate(trained) == Rate(0.6, measured=False)
    decoded = replace(config, metrics=trained.metrics | {"acceptance": {"alpha": 0.4}})
    assert known_rate(decoded) == Rate(0.4, measured=True)
    assert known_rate(decoded, lookup=False) is None  # both were measured with it


@pytest.mark.parametrize(
    "figures",
    [
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"alpha": float("nan")},
        {"alpha": 10**400},
        {"alpha": 0.5, "interval": [-1, 0.7]},
        [0.5],
    ],
)
def test_what_is_no_rate_counts_as_not_measured(
    tmp_path: Path, spec: ModelSpec, figures: object
) -> None:
    config = HeadConfig("norm", 2, 0, None, "tiny", "mark", metrics={"acceptance": figures})
    assert known_rate(config) is None
    put(tmp_path / "local" / "odd", 2, None, metrics=dict(config.metrics))
    assert Path(chosen(spec, mode="ppsd").head).name == "odd"


def test_plans_trust_the_low_end_of_what_was_held_out() -> None:
    few = {"alpha": 0.56, "interval": [0.4, 0.7], "examples": 5}
    config = HeadConfig("norm", 2, 0, None, "tiny", "mark", metrics={"validation": few})
    held_out = known_rate(config)
    assert held_out == Rate(0.56, measured=False, interval=(0.4, 0.7))
    assert held_out.expected == (0.4, "low end of 0.56 held out")
    measured = known_rate(replace(config, metrics={"acceptance": few}))
    assert measured is not None
    assert measured.expected == (0.56, "measured")


def test_the_best_for_model_and_exit_wins(tmp_path: Path) -> None:
    put(tmp_path / "local" / "unmeasured", 2, None)
    put(tmp_path / "local" / "good", 2, 0.6)
    put(tmp_path / "local" / "better", 2, 0.7)
    put(tmp_path / "local" / "other-exit", 3, 0.9)
    put(tmp_path / "local" / "other-model", 2, 0.9, fingerprint="other")
    put(tmp_path / "local" / "untrained", 2, 0.9, trained=False)
    names = [h.path.name for h in suitable(find_heads(), Identity("mark"), 2)]
    assert names == ["better", "good", "unmeasured"]
    assert suitable(find_heads(), Identity("mark"), None)[0].path.name == "other-exit"


def chosen(spec: ModelSpec, **settings: object) -> EngineConfig:
    return choose(EngineConfig(head="auto", **settings), spec, Identity("mark")).config


def test_auto_takes_the_exit_of_least_expected_time(tmp_path: Path, spec: ModelSpec) -> None:
    """A late exit is right more often, but with the stage it makes slowest nothing is gained."""
    put(tmp_path / "local" / "early", 2, 0.6)
    put(tmp_path / "local" / "late", 5, 0.62)
    assert Path(chosen(spec, mode="ppsd").head).name == "early"
    assert Path(chosen(spec, mode="ppsd", exit_layer=5).head).name == "late"
    split = chosen(spec, mode="ppsd", split=(2, 4))
    assert (Path(split.head).name, split.split) == ("early", (2, 4))


def test_a_head_that_no_split_suits_is_passed_over(tmp_path: Path, spec: ModelSpec) -> None:
    put(tmp_path / "local" / "late", 5, 0.9)
    assert chosen(spec, stages=3).head == "none"


def test_without_a_head_decoding_is_plain(spec: ModelSpec) -> None:
    config = chosen(spec, block=1, in_flight=2)
    assert (config.head, config.mode) == ("none", "autoregressive")


def test_a_head_that_will_not_pay_is_loaded_for_a_change_of_mode(
    tmp_path: Path, spec: ModelSpec
) -> None:
    put(tmp_path / "local" / "poor", 2, 0.01)
    choice = choose(EngineConfig(head="auto"), spec, Identity("mark"))
    config = choice.config
    assert (config.mode, Path(config.head).name, config.split) == ("autoregressive", "poor", (2,))
    assert "plain decoding as asked; exit 2 is predicted 1.0" in choice.reason
    assert "at α 0.01 (held out); speculation will not pay" in choice.reason
    asked = choose(EngineConfig(head="auto", mode="ppsd"), spec, Identity("mark"))
    assert asked.config.mode == "ppsd"
    assert "speculation will not pay" in asked.reason


def test_without_plan_a_head_is_used_whether_it_pays_or_not(
    tmp_path: Path, spec: ModelSpec
) -> None:
    put(tmp_path / "local" / "poor", 2, 0.01)
    choice = choose(EngineConfig(head="auto", plan="off"), spec, Identity("mark"))
    assert (choice.config.mode, choice.config.schedule) == ("ppsd", Schedule(1, 2))
    assert choice.reason == ""


def test_a_planned_llm_changes_modes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Stages in one process take turns, so the plan is plain decoding; the head is there."""
    model = tiny_model("llama")
    save_perfect_head(tmp_path / "local" / "perfect", model, 3)
    settings = {"head": "auto", "lookup": False, "dtype": "float64", "transport": "inprocess"}
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(str(model), **settings) as llm:
        assert llm.config.mode == "autoregressive"
        assert llm.layout.bounds == (0, 3, 6)
        plain = llm.run([5, 7], params)
        llm.use("ppsd")
        fast = llm.run([5, 7], params)
    assert fast.token_ids == plain.token_ids
    assert fast.stats.counts.accepted == fast.stats.counts.judged > 0


def test_an_own_drafter_needs_no_head(tiny_model: Callable[[str], Path]) -> None:
    oracle = OracleDrafter([5] * 40, 1.0, 290)
    with LLM(str(tiny_model("llama")), drafter=oracle, head="none", transport="inprocess") as llm:
        assert (llm.config.mode, llm.config.schedule) == ("ppsd", Schedule(1, 2))


def test_more_stages_than_cores_are_expected_to_take_turns(
    tmp_path: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "local" / "good", 2, 0.95)
    monkeypatch.setattr("ppsd.engine.choose.available_cores", lambda: [0, 1, 2])
    assert chosen(spec, stages=3, threads_per_stage=1).mode == "ppsd"
    monkeypatch.setattr("ppsd.engine.choose.available_cores", lambda: [0])
    assert chosen(spec, stages=3, threads_per_stage=1).mode == "autoregressive"


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_plan_and_generate_predict_the_same(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    """Three stages, on as many cores or fewer, with a head of which training alone is known."""
    model = tiny_model("llama")
    head = save_perfect_head(tmp_path / "local" / "own", model, 2)
    few = {"alpha": 0.9, "interval": [0.8, 0.95]}
    record_metrics(head, "validation", few)
    monkeypatch.setattr("ppsd.engine.choose.available_cores", lambda: list(range(cores)))
    shown = ppsd("plan", "-m", model, "--workers", 3, "--threads-per-stage", 1, "--json")
    record = json.loads(shown.stdout)
    best = next(p for p in record["plans"] if p["exit_layer"] and p["bitwise"])
    assert (best["alpha"], best["alpha_origin"]) == (0.8, "low end of 0.90 held out")
    files = resolve_model(str(model))
    found = Identity.of(describe(files), open_source(files.path))
    config = EngineConfig(str(model), stages=3, threads_per_stage=1)
    reason = choose(config, describe(files), found).reason
    assert f"predicted {best['speedup']:.2f}× plain at α 0.80 (low end of 0.90 held out)" in reason
    trees = choose(replace(config, rows="auto"), describe(files), found)
    way = max(record["waves"], key=lambda way: way["speedup"])
    assert f"predicted {way['speedup']:.2f}× plain at α 0.80" in trees.reason
    if way["speedup"] >= LEAST_GAIN:
        assert (trees.config.rows, list(trees.config.split or ())) == (way["rows"], way["split"])
        assert f"rows {way['rows']}, heads {way['heads']}" in trees.reason
    else:
        assert (trees.config.mode, trees.config.rows) == ("autoregressive", 1)
    together = "all stages" if cores == 3 else f"{cores} of 3 stages"
    assert f"{together} at once" in reason
    assert f"{together} at once" in record["assumed"]
    away = ppsd("plan", "-m", model, "--workers", 3, "--link-ms", "0.1", "--json")
    assert "all stages at once" in json.loads(away.stdout)["assumed"]


def test_rows_that_the_user_names_are_used(tmp_path: Path, spec: ModelSpec) -> None:
    put(tmp_path / "local" / "poor", 2, 0.01)
    assert chosen(spec).mode == "autoregressive"
    assert (chosen(spec, rows=4).mode, chosen(spec, rows=4).rows) == ("ppsd", 4)


def test_rows_are_refused_where_no_head_is_found(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="rows must be 1 without a head, and none was found"):
        chosen(spec, rows=4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "autoregressive"}, "in mode autoregressive"),
        ({"mode": "draft-then-verify"}, "in mode draft-then-verify"),
        ({"mode": "ppsd", "block": 2}, "with blocks of 2 tokens"),
        ({"stages": 1, "mode": "auto"}, "with one stage"),
        ({"head": "none"}, "without a head"),
    ],
)
def test_rows_and_heads_are_refused_where_no_waves_would_be_sent(settings, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"rows must be 1 {reason}.*, got 4"):
        LLM("nowhere", rows=4, **settings)
    with pytest.raises(ConfigError, match=f"heads must be none {reason}.*, got 'auto'"):
        LLM("nowhere", heads="auto", **settings)


def test_nothing_is_promised_of_lookup_alone(spec: ModelSpec) -> None:
    choice = choose(EngineConfig(head="lookup"), spec, Identity("mark"))
    assert choice.config.mode == "ppsd"
    assert "with no draft right" in choice.reason
    assert "that depends on the text" in choice.reason
    assert "α" not in choice.reason


def test_a_forced_head_keeps_no_promise_of_its_own_model(
    tiny_model: Callable[[str], Path], tmp_path: Path, spec: ModelSpec
) -> None:
    head = save_perfect_head(tmp_path / "head", tiny_model("llama"), 2)
    record_metrics(head, "acceptance", {"alpha": 0.9})
    config = EngineConfig(head=str(head), force_head=True)
    assert "at α 0.90 (measured on another model)" in choose(config, spec, Identity("x")).reason


def test_the_list_marks_what_was_held_out(tmp_path: Path) -> None:
    put(tmp_path / "local" / "a", 2, 0.5)
    [listed] = json.loads(ppsd("heads", "list", "--json").stdout)
    assert (listed["alpha"], listed["alpha_origin"]) == (0.5, "held out")
    assert "0.500 held out" in " ".join(ppsd("heads", "list").stdout.split())


def test_without_a_home_there_are_the_shipped_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "shipped" / "a", 2, 0.5)
    for name in ("PPSD_HEAD_DIR", "PPSD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    assert head_library.head_directory("a") == tmp_path / "shipped" / "a"
    assert head_library.head_directory("nowhere") == Path("nowhere")
    assert [h.name for h in find_heads()] == ["a"]
    told = ppsd("env", "--json")
    assert json.loads(told.stdout)["cache"].startswith("none (no home directory for a cache")
    assert ppsd("env").exit_code == 0
