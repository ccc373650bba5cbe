"""The command as a user runs it: real stage processes, pipes, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppsd import LLM, SamplingParams
from tests.support import command
from tests.support.tiny_models import save_perfect_head
from tests.unit.test_trace import arrows, check, lanes, read

ROOT = Path(__file__).parents[2]
PPSD = [sys.executable, "-m", "ppsd"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
PATIENCE_S = 120  # a hang fails; a busy machine does not


@pytest.fixture(scope="module")
def flags(tiny_model, tmp_path_factory) -> list[str]:
    """Three stages in three processes, and a head that is nearly always wrong."""
    head = save_perfect_head(tmp_path_factory.mktemp("head"), tiny_model(), 2, sign=-1.0)
    fixed = f"--model {tiny_model()} --head {head} --split 2,4 --dtype float64 --ignore-eos"
    return f"{fixed} --threads-per-stage 1".split()


def ppsd(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PPSD, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=PATIENCE_S,
        check=False,
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PPSD, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def plain(model: Path, content: str, new_tokens: int) -> str:
    with LLM(str(model), stages=1, dtype="float64", mode="autoregressive") as llm:
        params = SamplingParams(ignore_eos=True, max_tokens=new_tokens)
        return llm.generate([{"role": "user", "content": content}], params)[0].text


def test_json_and_trace(tiny_model, flags, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    result = ppsd("generate", "-", "--json", "--trace", trace, "-n", 24, *flags, stdin="the fox")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["text"] == plain(tiny_model(), "the fox", 24)
    assert len(record["memory_bytes"]) == 3
    events = read(trace)
    check(events, 3)
    assert len(arrows(events)) >= 24
    drafts = [piece for piece in lanes(events)[1] if piece["name"] == "draft"]
    assert len(drafts) >= record["counts"]["judged"] + record["counts"]["discarded"]


def test_chat_over_a_pipe(tiny_model, flags) -> None:
    result = ppsd("chat", "-n", 8, "--stats", *flags, stdin="the fox\n/reset\nthe fox\n/quit\nno\n")
    said = plain(tiny_model(), "the fox", 8)
    assert (result.returncode, result.stdout) == (0, f"{said}\n{said}\n")
    assert result.stderr.count("prompt tokens kept") == 1


def test_verify(flags, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\nfive jugs\n")
    result = command.ppsd("verify", prompts, "--json", "-n", 16, *flags)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["passed"], record["exact"], record["bitwise_logits"]) == (True, 2, 2)
    assert record["tokens"] == 32


def test_a_reader_that_leaves_is_no_error_of_ours(flags) -> None:
    """As in ``ppsd generate … | head -1``."""
    process = start("generate", "the fox", "-n", 400, *flags)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.wait(PATIENCE_S)
    assert "Traceback" not in errors
    assert "Error" not in errors


def test_ctrl_c_leaves_at_once_and_no_process_behind(flags) -> None:
    process = start("generate", "the fox", "-n", 400, "--timeout", 30, *flags)
    assert process.stdout is not None
    process.stdout.read(1)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")  # each has those it started
    children = [child for thread in threads for child in thread.read_text().split()]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert len(children) == 2
    assert [pid for pid in children if Path(f"/proc/{pid}").exists()] == []


def test_a_failure_is_one_line_and_exit_code_1(tmp_path) -> None:
    result = ppsd("generate", "x", "--model", tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"ppsd: {tmp_path}: this directory has no config.json\n"
