"""What may surround a command: closed or full streams, strangers' files, no home, open ports."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ppsd import LLM
from tests.support.ports import free_port
from tests.system.test_cli import ENVIRONMENT, PATIENCE_S, PPSD

STRANGERS = ("safetensors", "numbers", "queue", "torch", "typer", "inspect", "jinja2")


@pytest.fixture(scope="module")
def generate(tiny_model) -> list[str]:
    fixed = f"--model {tiny_model()} --head none --dtype float64 --threads-per-stage 1 -n 4"
    return [*PPSD, "generate", "the fox", *fixed.split(), "--ignore-eos"]


def run(command: list[str], redirection: str = "", **how) -> subprocess.CompletedProcess[str]:
    """Run a command with what a shell would make of ``redirection``."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command],
        **{"env": ENVIRONMENT, "stdin": subprocess.DEVNULL} | how,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("redirection", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_no_obstacle(generate, redirection) -> None:
    result = run(generate, redirection)
    assert result.returncode == 0, result.stderr
    assert bool(result.stdout) == (">" not in redirection)
    assert ("standard output is closed" in result.stderr) == (redirection == ">&-")


def test_a_prompt_from_closed_standard_input_is_an_empty_prompt(generate) -> None:
    result = run([*PPSD, "generate", "-"], "<&-")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "prompt must be a non-empty text" in result.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_sentence(unbuffered) -> None:
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
    result = run([*PPSD, "--help"], "> /dev/full", env=environment)
    words = "ppsd: standard output cannot be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, words)


def test_strangers_files_in_the_working_directory_change_nothing(generate, tmp_path) -> None:
    for name in STRANGERS:
        (tmp_path / f"{name}.py").write_text("open(__file__ + '.ran', 'w')\nraise SystemExit\n")
    result = run(generate, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert sorted(Path(tmp_path).iterdir()) == sorted(tmp_path / f"{n}.py" for n in STRANGERS)


def test_one_host_listens_on_its_loopback_interface_alone(tiny_model) -> None:
    settings = {"head": "none", "dtype": "float64", "threads_per_stage": 1}
    with LLM(str(tiny_model()), transport="distributed", **settings):
        here = psutil.Process()
        family = [here, *here.children(recursive=True)]
        found = [c for p in family for c in p.net_connections("inet")]
    listening = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
    assert len(family) >= 2
    assert listening == {"127.0.0.1"}


LATE_RANK = """
import sys
import ppsd.model.source as source
describe = source.describe
def late(files):
    print("late", flush=True)
    sys.stdin.read()
    return describe(files)
source.describe = late
from ppsd.cli.app import main
sys.exit(main())
"""


@pytest.fixture
def ranks(generate):
    """Start two ranks, of which the second, after joining, waits for the end of its input."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started: list[subprocess.Popen[str]] = []

    def start(*flags: object) -> list[subprocess.Popen[str]]:
        command = [*generate[len(PPSD) :], *map(str, flags)]
        for rank, program in enumerate((PPSD, [sys.executable, "-c", LATE_RANK])):
            process = subprocess.Popen(
                [*program, *command],
                env=ENVIRONMENT | meeting | {"RANK": str(rank)},
                text=True,
                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            )
            started.append(process)
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("comes", [True, False])
def test_a_rank_late_after_joining_has_as_long_as_for_joining(ranks, comes) -> None:
    """``--timeout`` is for stages at work; a late rank is one sentence, and it ends as well."""
    patience = PATIENCE_S if comes else 15
    flags = ("--transport", "distributed", "--timeout", 1, "--init-timeout", patience)
    head, late = ranks(*flags)
    assert late.stdout.readline() == "late\n"
    if comes:
        time.sleep(6)  # no sign of life is awaited for less than five seconds
        late.stdin.close()
    said = head.communicate(timeout=PATIENCE_S)
    if not comes:
        late.stdin.close()
    late.stdin = None
    words = late.communicate(timeout=PATIENCE_S)
    assert (head.returncode, late.returncode) == ((0, 0) if comes else (1, 1)), (said, words)
    if comes:
        assert said[0]
        assert words[1] == ""
    else:
        assert said[1].startswith("ppsd: ")
        assert said[1].count("\n") == words[1].count("\n") == 1
