"""``ppsd distill`` as people meet it: killed, continued, refused, and its heads put to use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ppsd.cli.app import app
from ppsd.errors import ConfigError, PpsdError
from ppsd.model.head_files import read_prompts
from ppsd.train.checkpoint import alone_in
from ppsd.train.records import read_data

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
    assert "training takes less than a minute" in told
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


def test_a_head_that_read_all_before_is_said_to_look_too_good(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    model, begun = tiny_model("llama"), tmp_path / "begun"
    run(*arguments(model, data, begun))
    start = begun / "transformer-4"
    again = arguments(model, data, tmp_path / "again", "--start", str(start))
    assert "read by --start" not in " ".join(invoke(*again).stderr.split()), "held out is unread"
    every = {digest for record in read_data([str(data)])[0] for digest in record.prompts}
    assert set(read_prompts(start)) < every
    (start / "prompts.txt").write_text("\n".join(every) + "\n")
    again = arguments(model, data, tmp_path / "over", "--start", str(start))
    told = re.search(r"(\d+) more held out \((\d+) of", " ".join(invoke(*again).stderr.split()))
    assert told is not None
    assert told[1] == told[2]


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
    refused = {
        (
            "--exit-layer",
            "2",
        ): r"start must be one head for each exit of 2 \(it is at exit 4\), got",
        ("--head-mlp", "8"): r"a head with mlp 8, as this run trains \(it has None\), got '",
        ("--head", "norm"): r"a head with kind 'norm', as this run trains \(it has 'transformer'\)",
    }
    for more, why in refused.items():
        with pytest.raises(PpsdError, match=why):
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


def test_a_finished_run_writes_no_more_targets(
    tiny_model: Models, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = arguments(tiny_model("llama"), data, out, "--self-generate", "--minutes", "1")
    run(*command, "--max-new", "4")
    (out / "generated.jsonl").write_text(
        "".join((out / "generated.jsonl").read_text().splitlines(keepends=True)[:70])
    )  # as if the time for writing had been over after 70
    (out / "finished.json").unlink()
    with pytest.raises(PpsdError, match=r"transformer-2 is there, and not of this run; give anoth"):
        run(*command, "--max-new", "4")
    for exit_layer in (2, 4):
        shutil.rmtree(out / f"transformer-{exit_layer}")
    monkeypatch.setattr("ppsd.train.distill.Trainer.run", interrupted)
    assert CliRunner().invoke(app, [*command, "--max-new", "4"]).exit_code == 130
    assert (out / "generated.jsonl").read_text().count("\n") == 80, "nothing was trained on"
    monkeypatch.undo()
    run(*command, "--max-new", "4")
    monkeypatch.setattr("ppsd.train.targets.write_targets", None)
    again = invoke(*command, "--max-new", "4")
    assert "this run is finished" in " ".join(again.stderr.split())
    (out / "transformer-4" / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(PpsdError, match=r"this run is finished, but cannot read .*transformer-4/"):
        run(*command, "--max-new", "4")


def test_what_would_spoil_a_run_is_refused_before_it(
    tiny_model: Models, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments(tiny_model("llama"), data, tmp_path / "out")
    with alone_in(tmp_path / "out"):
        for more in ((), ("--generate-only",)):
            with pytest.raises(PpsdError, match=r"another run is at work in .*out; give another"):
                run(*command, *more)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(PpsdError, match=r"out has 0 MiB free, and checkpoints need about \d"):
            run(*command)
    run(*command, "--minutes", "1e-9")
    with pytest.raises(ConfigError, match=r"epochs must be at most 125000 over 80 examples"):
        run(*command, "--epochs", "200000")


def test_a_fine_tune_does_not_go_on_with_what_the_model_had(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    """Though heads of one may serve the other: a merged LoRA leaves all norms alone."""
    tuned = shutil.copytree(tiny_model("llama"), tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors = {name: t * 1.5 if "v_proj" in name else t for name, t in tensors.items()}
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    out, kept = tmp_path / "out", ("--features", str(tmp_path / "rows"))
    run(*arguments(tiny_model("llama"), data, out))
    run(*arguments(tiny_model("llama"), data, tmp_path / "other", *kept))
    with pytest.raises(
        PpsdError, match=r"out holds another run: weights was '[0-9a-f]{16}' and is"
    ):
        run(*arguments(tuned, data, out))
    with pytest.raises(PpsdError, match=r"rows of layers .* give another --features"):
        run(*arguments(tuned, data, tmp_path / "new", *kept))


def test_a_head_tells_what_it_has_read_or_that_nobody_knows(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    run(*arguments(tiny_model("llama"), data, first))
    start = ("--start", str(first / "transformer-2"), "--exit-layer", "2")
    read = first / "transformer-2" / "prompts.txt"
    command = arguments(tiny_model("llama"), data, tmp_path / "next", *start)
    assert "has no prompts.txt" not in " ".join(invoke(*command).stderr.split())
    read.unlink()
    with pytest.raises(PpsdError, match="holds another run: read was"):
        run(*command)
    told = invoke(*arguments(tiny_model("llama"), data, tmp_path / "last", *start)).stderr
    assert "a head of --start has no prompts.txt" in " ".join(told.split())
    read.write_text("hello\n")
    with pytest.raises(PpsdError, match=r"prompts.txt: 'hello' is no digest of \d+ digits"):
        run(*arguments(tiny_model("llama"), data, tmp_path / "third", *start))


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_self_generation_trains_on_what_was_given(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    """Running text is kept, and answers to prompts of an earlier call are not."""
    out, half, book = tmp_path / "out", tmp_path / "half.jsonl", tmp_path / "book.txt"
    half.write_text("".join(data.read_text().splitlines(keepends=True)[:30]))
    book.write_text("the lazy dog jumps over the quick fox " * 40)
    run(*arguments(tiny_model("llama"), data, out, "--generate-only", "--max-new", "4"))
    more = ("--data", str(book), "--self-generate", "--max-new", "4")
    told = invoke(*arguments(tiny_model("llama"), half, out, *more)).stderr
    found = re.search(r"(\d+) examples.* (\d+) more held out", " ".join(told.split()))
    assert found
    windows = sum(map(int, found.groups())) - 30
    assert 1 < windows < 30, "of the book, not of 50 other prompts"


def test_prompts_without_room_for_an_answer_are_said_to_have_none(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    """Text to train on besides is enough."""
    command = arguments(tiny_model("llama"), data, tmp_path / "out", "--self-generate")
    command[command.index("--max-length") + 1] = "8"
    with pytest.raises(PpsdError, match="no answer was written; give shorter prompts"):
        run(*command, "--max-new", "4")
    book = tmp_path / "book.txt"
    book.write_text("the lazy dog jumps over the quick fox " * 40)
    told = invoke(*command, "--max-new", "4", "--data", str(book))
    assert "80 prompts leave no room for an answer" in " ".join(told.stderr.split())


def test_an_edited_chat_template_does_not_go_on_with_another_run(
    tiny_model: Models, data: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    command = arguments(tiny_model("llama"), data, tmp_path / "out")
    run(*command, "--chat-template", str(template))
    template.write_text("{% for m in messages %}the fox says {{ m['content'] }} {% endfor %}")
    with pytest.raises(PpsdError, match="holds another run: chat_template was"):
        run(*command, "--chat-template", str(template))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--draft-vocab", "-3"), "draft_vocab must be an integer of at least 0"),
        (("--draft-vocab", "9999"), "draft_vocab must be in"),
        (("--start", "nowhere"), "no exit head at nowhere"),
        (("--vocab-data", "missing.txt"), "cannot read training data from missing.txt"),
        (("--head", "norm", "--head-mlp", "40"), "head_mlp must be left out with norm heads"),
        (("--threads", "-5"), "threads must be an integer of at least 0"),
        (("--seed", str(2**40)), "seed must be an integer in"),
        (("--generate-batch", "100000000"), "generate_batch must be an integer in"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_written(
    tiny_model: Models, data: Path, tmp_path: Path, more: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(PpsdError, match=complaint):
        run(*arguments(tiny_model("llama"), data, tmp_path / "out", "--self-generate", *more))
    assert not (tmp_path / "out" / "generated.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--temperature", "0.7"), "temperature must be left out without --self-generate"),
        (("--exit-layer", "9"), "exit_layer must be in"),
        (("--exit-layer", "a"), "exit_layer must be integers"),
        (("--max-length", "4096"), "max_length must be at most 512"),
        (("--device", "tpu"), "device must be cpu or a GPU"),
    ],
)
def test_refusals(
    tiny_model: Models, data: Path, tmp_path: Path, more: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(PpsdError, match=complaint):
        run(*arguments(tiny_model("llama"), data, tmp_path / "out", *more))
