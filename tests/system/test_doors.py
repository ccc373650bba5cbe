"""What may surround a command: closed or full streams, strangers' files, no home, open ports."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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
