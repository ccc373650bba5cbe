"""The simulate and paper commands, through the same entry point as the shell's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.pipelines import predict
from ppsd.plan.presets import find_hardware, find_shape
from tests.support.command import lab


def rows(*arguments: object) -> list[dict]:
    result = lab("simulate", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def test_simulate_gives_the_speedups_of_the_three_modes() -> None:
    found = {row["mode"]: row for row in rows("--alpha", 1, "--tokens", 1001, "--block", 5)}
    assert [row["speedup"] for row in found.values()] == [1.0, 2.5, 4.0]  # 5·32 / (5·8 + 24); P
    assert found["draft-then-verify"]["block"] == 5
    assert found["ppsd"]["paper_speedup"] == 4.0
    assert found["autoregressive"]["ms_per_token"] == 32.0


def test_a_recorded_trace_takes_the_place_of_alpha(tmp_path: Path) -> None:
    trace = tmp_path / "hits.json"
    trace.write_text("[1, 1, 1, 0]")
    ppsd_row = rows("--trace", trace, "--tokens", 401)[2]
    assert ppsd_row["alpha"] == 0.75
    assert ppsd_row["ms_per_token"] == 14.0  # (3 · 8 + 32) / 4
    trace.write_text("{}}")
    with pytest.raises(ConfigError, match="JSON list"):
        raise lab("simulate", "--trace", trace).exception


def test_alpha_is_interpolated_between_exits() -> None:
    found = rows("--alpha", "4:0.4,8:0.6", "--sweep", "exit", "--tokens", 20, "--layers", 12)
    by_exit = {row["exit_layer"]: row["alpha"] for row in found}
    assert by_exit == {1: 0.4, 2: 0.4, 3: 0.4, 4: 0.4, 5: 0.45, 6: 0.5, 7: 0.55, 8: 0.6, 9: 0.6}


@pytest.mark.parametrize(
    ("axis", "column", "first", "last"),
    [("alpha", "alpha", "0.0", "1.0"), ("hop", "hop_ms", "0.0", "100.0"),
     ("stages", "stages", "1", "16")],
)  # fmt: skip
def test_sweeps_become_csv_and_plots(
    tmp_path: Path, axis: str, column: str, first: str, last: str
) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "plot.png"
    result = lab("simulate", "--tokens", 30, "--sweep", axis, "--csv", table, "--plot", picture)
    assert result.exit_code == 0, result.output
    written = list(csv.DictReader(table.open()))
    assert (written[0][column], written[-1][column]) == (first, last)
    assert {row["mode"] for row in written} == {"autoregressive", "draft-then-verify", "ppsd"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gantt_charts_are_traces_of_the_same_tokens(tmp_path: Path) -> None:
    options = ("--gantt", tmp_path, "--tokens", 12, "--stages", 3, "--head-ms", 0.5)
    assert lab("simulate", *options).exit_code == 0
    for mode in ("autoregressive", "draft-then-verify", "ppsd"):
        events = json.loads((tmp_path / f"{mode}.json").read_text())["traceEvents"]
        pieces = [e for e in events if e["ph"] == "X"]
        assert {e["tid"] for e in pieces} == {1, 2, 3}
        drafted = any(e["name"] == "draft" for e in pieces)
        assert drafted == (mode != "autoregressive")
        last_rows = [e["args"] for e in pieces if e["tid"] == 3 and e["name"] == "verify"]
        assert max(row["position"] + row["rows"] for row in last_rows) == 12
    assert (tmp_path / "gantt.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "lots"], "alpha must be a rate such as 0.8"),
        (["--alpha", "1.5"], "alpha must be a rate"),
        (["--stages", "40"], r"stages must be in \[1, 32\]"),
        (["--exit-layer", "30"], r"exit_layer must be in \[1, 29\]"),
        (["--sweep", "moon"], "sweep must be one of alpha, exit, hop, stages"),
        (["--model", "vicuna-7b"], "together with --hardware"),
        (["--model", "nope", "--hardware", "wan"], "model must be a config.json, or one of"),
        (["--model", "vicuna-7b", "--hardware", "abacus"], "hardware must be one of h100-nvlink"),
        (["--layer-ms", "0"], "layer must be finite and at least"),
        (["--plot", "x.png"], "together with --sweep"),
        (["--hop-ms", "1e12"], "simulated time must be shorter"),
        (["--layer-ms", "1e13"], "simulated time must be shorter"),
        (["--stages", "1", "--rows", "4"], "rows must be left out with one stage"),
        (["--stages", "1", "--exit-layer", "3"], "exit_layer must be left out with one stage"),
        (["--stages", "1", "--sweep", "exit"], "sweep must be alpha, hop or stages with one stage"),
    ],
)
def test_bad_options_are_refused_by_name(arguments: list[str], message: str) -> None:
    result = lab("simulate", *arguments)
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def test_shapes_have_the_models_published_sizes() -> None:
    billions = {"vicuna-7b": 6.74, "llama-2-13b": 13.0, "llama-2-70b": 69.0, "llama-3-8b": 8.03,
                "qwen3-8b": 8.19}  # fmt: skip
    for name, published in billions.items():
        sizes = find_shape(name).sizes
        weights = sizes.layers * sizes.layer + 2 * sizes.lm_head
        assert weights / 1e9 == pytest.approx(published, rel=0.005), name


def test_a_config_json_is_a_shape_and_predictions_say_so(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
              "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, known = find_shape(str(tmp_path)), find_shape("smollm2-135m")
    assert shape.sizes.layer == known.sizes.layer
    cost = predict(shape, find_hardware("10gbe"), (10, 20))
    assert cost.stages[0].layer == pytest.approx(shape.sizes.layer * 2 / 1.008e12)
    assert cost.source.startswith("prediction")
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="with vocab_size"):
        find_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": None},
            "model must be a config.json with hidden_size, got '.*config.json'",
        ),
        ({"hidden_size": "x"}, "hidden_size must be an integer"),
        ({"model_type": "mixtral"}, "architecture 'mixtral' is not supported"),
    ],
)
def test_a_config_json_that_is_no_shape_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
              "num_attention_heads": 9, "vocab_size": 49152}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(PpsdError, match=message):
        find_shape(str(tmp_path))


def test_weights_are_not_read_as_text(tmp_path: Path) -> None:
    for name, message in (
        ("model.gguf", "must be a config.json"),
        ("x.json", "larger than 16 MiB"),
    ):
        with (tmp_path / name).open("w") as file:
            file.truncate(1 << 38)  # sparse: takes no room, but nobody could read it
        with pytest.raises(PpsdError, match=message):
            find_shape(str(tmp_path / name))


def test_a_shape_has_the_context_that_ppsd_would_use(tmp_path: Path) -> None:
    for sizes, context in [
        ({}, None),
        ({"max_position_embeddings": 32768}, 32768),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
    ]:
        config = {"num_hidden_layers": 3, "hidden_size": 576, "intermediate_size": 1536,
                  "num_attention_heads": 9, "vocab_size": 49152}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | sizes))
        assert find_shape(str(tmp_path)).context == context


def test_the_paper_on_paper_answers_its_questions(tmp_path: Path) -> None:
    result = lab("paper", "--out", tmp_path, "--tokens", 200)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "report.md").read_text()
    assert "ppsd-lab paper --tokens 200 --seed 0" in text
    assert "commit" in text
    claims = list(csv.DictReader((tmp_path / "claims.csv").open()))
    needed = {(c["speedup"], c["N"], c["E"]): c["α needed"] for c in claims}
    assert needed["3.81", "32", "4"] == "0.8429"
    assert needed["2.01", "32", "16"] == ""
    losses = list(csv.DictReader((tmp_path / "break_even.csv").open()))
    assert losses[0]["break-even α, bare"] == "0.125"  # 36 layers for 1 + α tokens
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).is_file()
