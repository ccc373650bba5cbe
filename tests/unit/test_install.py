"""tools/install.py: one line of progress, and pip's own words only when it fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "install.py"
PIP_SAYS = """Looking in indexes: https://example.org/simple
Collecting torch==2.13.0
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (800.0 MB)
Progress 0 of 800000000
Progress 400000000 of 800000000
Installing collected packages: torch
[notice] A new release of pip is available
"""


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("install", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(says: str, status: int) -> subprocess.Popen[str]:
    code = f"import sys; print({says!r}, end=''); sys.exit({status})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_progress_is_all_that_is_shown(tool, capsys) -> None:
    assert tool.follow(process(PIP_SAYS, 0)) == 0
    shown = capsys.readouterr()
    assert shown.out == "downloading torch: 0 of 800 MB\nunpacking, a minute or two\n"
    assert shown.err == ""


def test_a_failure_is_told_in_pip_s_words(tool, capsys) -> None:
    assert tool.follow(process(PIP_SAYS + "ERROR: no space left\n", 1)) == 1
    assert capsys.readouterr().err.endswith("ERROR: no space left\n")
