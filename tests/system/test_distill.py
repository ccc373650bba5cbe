"""``ppsd distill`` as people meet it: killed, continued, refused, and its heads put to use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ppsd.cli.app import app
from ppsd.errors import PpsdError

Models = Callable[[str], Path]
DEADLINE_S = 120.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"the quick {i}", "target": "fox jumps over " + "the lazy dog " * (i % 5)}
        for i in range(80)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--max-length", "96", "--draft-vocab", "120", "--batch-tokens", "256"]
    return ["distill", "-m", str(model), "--data", str(data), "--out", str(out), "--exit-layer",
            "2,4", "--threads", "1", *fixed, *more]  # fmt: skip


def invoke(*args: str) -> Result:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def run(*args: str) -> str:
    return invoke(*args).stdout


def test_killed_and_continued_ends_with_the_same_heads(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    schedule = ("--epochs", "8", "--checkpoint-every", "5", "--validate-every", "7")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = arguments(tiny_model("llama"), data, cut, *schedule)
    process = subprocess.Popen(
        [sys.executable, "-m", "ppsd", *command], stderr=subprocess.PIPE, env=os.environ.copy()
    )
    metrics, deadline = cut / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 30:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "transformer-2").exists(), "killed too late to prove anything"

    run(*arguments(tiny_model("llama"), data, whole, *schedule))
    assert (cut / "checkpoint.safetensors").exists()
    run(*command)
    assert not (cut / "checkpoint.safetensors").exists()
    again = invoke(*command)
    assert "this run is finished, and its heads are in" in " ".join(again.stderr.split())
    for name in ("transformer-2", "transformer-4"):
        first, second = (d / name / "head.safetensors" for d in (whole, cut))
        assert first.read_bytes() == second.read_bytes()


def test_heads_describe_themselves_and_are_put_to_use(
    tiny_model: Models, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = str(tiny_model("llama")), tmp_path / "heads" / "run"
    told = " ".join(invoke(*arguments(tiny_model("llama"), data, out)).stderr.split())
    assert "training takes about 0 min" in told
    assert "prompt lookup alone would be right for" in told
    shown = json.loads(run("heads", "show", str(out / "transformer-4")))
    assert shown["provenance"]["data"][0]["records"] == 80
    assert shown["provenance"]["settings"]["kl_weight"] == 1.0
    assert 0 <= shown["metrics"]["validation"]["lookup"] < 1
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path / "heads"))
    listed = json.loads(run("heads", "list", "--json"))
    assert {(h["exit_layer"], h["alpha"]) for h in listed if not h["shipped"]} == {
        (layer, json.loads((out / f"transformer-{layer}" / "head.json").read_text())["metrics"]
         ["validation"]["alpha"]) for layer in (2, 4)
    }  # fmt: skip
    common = ("generate", "-m", model, "--head", "auto", "--transport", "inprocess")
    common += ("-n", "8", "--json", "hello")
    drafted = json.loads(run(*common, "--exit-layer", "2", "--mode", "ppsd"))
    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path / "nothing"))
    plain = json.loads(run(*common))
    assert (drafted["mode"], plain["mode"]) == ("ppsd", "autoregressive")
    assert drafted["token_ids"] == plain["token_ids"]


def alpha(head: Path, name: str) -> float:
    figures = json.loads((head / "head.json").read_text())["metrics"]["validation"]
    return float(figures[name])


def test_training_goes_on_from_a_head(tiny_model: Models, data: Path, tmp_path: Path) -> None:
    """It begins as good as the other run ended, on the same held-out text."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(*arguments(tiny_model("llama"), data, first, "--epochs", "6", "--learning-rate", "0.02"))
    given = first / "transformer-4"
    run(*arguments(tiny_model("llama"), data, second, "--start", str(given)))
    assert alpha(given, "alpha") > alpha(given, "start") + 0.01
    begun = alpha(second / "transformer-4", "start")
    assert begun == pytest.approx(alpha(given, "alpha"), abs=1e-5)
    assert alpha(second / "transformer-2", "start") == alpha(first / "transformer-2", "start")
    settings = json.loads((second / "transformer-4" / "head.json").read_text())
    assert settings["provenance"]["settings"]["start"] == str(given)
    read = [json.loads((d / "transformer-4" / "head.json").read_text())["provenance"]["tokens"]
            for d in (first, second)]  # fmt: skip
    assert settings["provenance"]["start"]["tokens"] == read[0]
    assert read[1] == read[0] + read[0] // 6, "six passes and one more"
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("quick", "slow"))
    run(*arguments(tiny_model("llama"), other, tmp_path / "last", "--start", str(given)))
    prompts = [(d / "transformer-4" / "prompts.txt").read_text().split()
               for d in (first, tmp_path / "last")]  # fmt: skip
    assert set(prompts[0]) < set(prompts[1]), "it was trained on both"
    assert len(prompts[1]) == 2 * len(prompts[0])
    unfit = arguments(tiny_model("llama"), data, tmp_path / "third", "--start", str(given))
    for more in (("--exit-layer", "2"), ("--head-mlp", "8"), ("--head", "norm")):
        with pytest.raises(PpsdError, match=r"start must be one head an exit \([24, ]+\), with"):
            run(*unfit, *more)
    with pytest.raises(PpsdError, match="no exit head at nowhere"):
        run(*unfit, "--start", "nowhere")
    with pytest.raises(PpsdError, match="belongs to"):
        run(*arguments(tiny_model("qwen2"), data, tmp_path / "third", "--start", str(given)))


def test_without_heads_generate_says_how_to_get_one(
    tiny_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path))
    model = str(tiny_model("llama"))
    arguments = ("generate", "-m", model, "--head", "auto", "--transport", "inprocess")
    result = invoke(*arguments, "-n", "2", "hello")
    said = " ".join(result.stderr.split())
    assert "so decoding is plain" in said
    assert f"ppsd distill --model {model} --exit-layer" in said


def test_self_generation_and_training_in_one_command(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    """With no exits named: after a quarter and half of the layers."""
    out = tmp_path / "out"
    command = arguments(tiny_model("llama"), data, out)
    at = command.index("--exit-layer")
    del command[at : at + 2]
    run(*command, "--self-generate", "--max-new", "8", "--head", "norm")
    assert {path.name for path in out.glob("norm-*")} == {"norm-2", "norm-3"}, "of 7 layers"
    head = json.loads((out / "norm-2" / "head.json").read_text())
    assert [Path(d["name"]).name for d in head["provenance"]["data"]] == [
        "data.jsonl",
        "generated.jsonl",
    ]
    assert (out / "generated.jsonl").read_text().count("\n") == 80


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--exit-layer", "9"), "exit_layer must be in"),
        (("--exit-layer", "a"), "exit_layer must be integers"),
        (("--max-length", "4096"), "max_length must be at most 512"),
        (("--draft-vocab", "9999"), "draft_vocab must be in"),
        (("--device", "tpu"), "device must be cpu or a GPU"),
    ],
)
def test_refusals(
    tiny_model: Models, data: Path, tmp_path: Path, more: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(PpsdError, match=complaint):
        run(*arguments(tiny_model("llama"), data, tmp_path / "out", *more))
