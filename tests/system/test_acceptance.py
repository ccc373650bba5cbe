"""``ppsd acceptance`` from the shell's entry point: result files, tables, the engine, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from ppsd.cli.app import app
from ppsd.errors import HeadError, PpsdError
from ppsd.lab.cli.app import app as lab
from ppsd.model.head_files import read_head_config, save_head
from ppsd.model.head_library import known_rate
from tests.support.tiny_models import save_perfect_head

Models = Callable[[str], Path]


def run(*arguments: object, command: Typer = app) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments], env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def heads(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, model = tmp_path_factory.mktemp("heads"), tiny_model("llama")
    save_perfect_head(root / "wrong", model, 2, sign=-1.0)
    save_perfect_head(root / "right", model, 4)
    save_perfect_head(root / "late", model, 5)
    return root


@pytest.fixture
def command(tiny_model: Models, heads: Path, tmp_path: Path) -> Callable[..., list[object]]:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"the quick {i}", "category": "abc"[i % 3], "id": i} for i in range(9)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(names: str, *more: object) -> list[object]:
        directories = ",".join(str(heads / name) for name in names.split(","))
        fixed = ["-m", tiny_model("llama"), "--head", directories, "--data", prompts, "-n", 10]
        where = ["--out", tmp_path / "out", "--max-length", 128, "--threads", 1, "--lookup", "off"]
        return ["acceptance", *fixed, *where, "--dtype", "float64", *more]

    return arguments


def test_result_files(command, tmp_path: Path) -> None:
    printed = json.loads(run(*command("right,wrong,late", "--json")).stdout)
    out = tmp_path / "out"
    assert json.loads((out / "acceptance.json").read_text()) == printed
    assert (out / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    figures = printed["heads"]
    assert list(figures) == ["wrong", "right", "late"]  # by exit layer
    assert {label: f["exit_layer"] for label, f in figures.items()} == {
        "wrong": 2, "right": 4, "late": 5,
    }  # fmt: skip
    assert (figures["right"]["alpha"], figures["wrong"]["alpha"]) == (1.0, 0.0)
    judged = figures["right"]["judged"]
    assert printed["first_right"]["counts"] == {"wrong": 0, "right": judged, "late": 0, "none": 0}
    assert printed["first_right"]["boundaries"] == [2, 4, 5]
    assert set(figures["right"]["by_category"]) == {"a", "b", "c"}
    assert (printed["dtype"], printed["left_out"]) == ("float64", 0)
    assert {"commit", "command", "cpu"} <= set(printed["provenance"])


def test_alpha_is_recorded_in_the_head_when_asked(command, heads: Path, tmp_path: Path) -> None:
    run(*command("right"))
    assert "acceptance_alone" not in read_head_config(heads / "right").metrics
    printed = json.loads(run(*command("right", "--json", "--record")).stdout)
    config = read_head_config(heads / "right")
    assert config.metrics["acceptance_alone"]["alpha"] == printed["heads"]["right"]["alpha"] == 1.0
    assert config.metrics["acceptance_alone"]["data"] == printed["data"]
    rate = known_rate(config, lookup=False)
    assert rate is not None
    assert (rate.alpha, rate.measured) == (1.0, True)
    drawn = command("right", "--json", "--record", "--temperature", 1)
    run(*drawn, "--limit", 2, "--out", tmp_path / "drawn")
    metrics = read_head_config(heads / "right").metrics
    assert metrics["acceptance_alone"] == config.metrics["acceptance_alone"], "plans are greedy"
    told = ("temperature", "limit", "prompts", "stages")
    assert [metrics["acceptance_sampled_alone"][name] for name in told] == [1.0, 2, 2, 2]


def test_a_head_of_a_deeper_model_is_named_for_what_it_is(command, heads: Path) -> None:
    deep = replace(read_head_config(heads / "right"), exit_layer=6)
    save_head(heads / "deep", deep, {"norm.weight": torch.ones(4)})
    with pytest.raises(HeadError, match=r"deep is a head for exit 6, and not of .*has 6 layers$"):
        run(*command("deep"))


def test_real_processes_agree(command) -> None:
    """Where a verdict overtakes a draft, that draft is not judged: how often is up to the clock."""
    decoded = json.loads(run(*command("right", "--json", "--decode", 2)).stdout)["heads"]["right"]
    decoded = decoded["decoded"]
    assert decoded["prompts"] == decoded["equal_tokens"] == 2
    assert decoded["accepted"] == decoded["judged"] > 0
    assert decoded["judged"] + decoded["late"] == decoded["compared"] == 18
    assert decoded["differing"] == decoded["late"]


def test_further_heads_reuse_what_is_there(command, tmp_path: Path) -> None:
    run(*command("wrong"))
    out = tmp_path / "out"
    answers = (out / "generated-float64.jsonl").read_bytes()
    lines = (out / "outcomes.jsonl").read_bytes()
    shown = run(*command("wrong,right", "--by", "position")).stdout
    assert (out / "generated-float64.jsonl").read_bytes() == answers
    assert (out / "outcomes.jsonl").read_bytes().startswith(lines)
    assert (out / "outcomes.jsonl").read_bytes().count(b"\n") == 18
    assert "position" in shown
    assert "1–8" in shown
    assert "first head that is right, by exit layer: wrong 0.0% · right 100.0% · none 0.0%" in shown


def test_the_trace_can_be_simulated(command, tmp_path: Path) -> None:
    run(*command("right,wrong"))
    for label, speedup in (("right", 4.0), ("wrong", 1.0)):
        trace = tmp_path / "out" / f"trace-{label}.json"
        simulated = run("simulate", "--json", "--trace", trace, "--tokens", 1001, command=lab)
        rows = {row["mode"]: row for row in json.loads(simulated.stdout)["rows"]}
        assert rows["ppsd"]["speedup"] == speedup


@pytest.mark.parametrize(
    ("names", "more", "complaint"),
    [
        ("right", ("--by", "size"), "by must be one of category, position, got 'size'"),
        ("right", ("-n", "1"), "max_tokens must be at least 2: no draft is made for the last"),
        ("right", ("--limit", "0"), "limit must be at least 1"),
        ("right", ("--dtype", "int8"), "dtype must be one of auto, "),
        ("right", ("--max-length", "9999"), "max_length must be at most 512"),
        ("right", ("--max-length", "8"), "no prompt leaves room for two tokens within 8"),
        ("right", ("--stages", "5"), r"exit_layer must be an integer in \[1, 2\], got 4"),
        ("right,right", (), "head must be directories of different names"),
        ("nothing", (), "no exit head at .*nothing: head.json is missing"),
        ("right", ("--head", ","), "head must be head directories separated by commas"),
        ("right", ("--data", "/no/where"), "cannot read prompts from /no/where"),
    ],
)
def test_refusals(command, names: str, more: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(PpsdError, match=complaint):
        run(*command(names, *more))
