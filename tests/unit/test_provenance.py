"""Provenance names the command that ran, whatever it was."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

import pytest

from ppsd.provenance import provenance


@pytest.mark.parametrize(
    ("argv", "module", "command"),
    [
        (["/x/bin/ppsd", "plan", "a b"], None, "ppsd plan 'a b'"),
        (["/x/bin/ppsd-lab", "tasks"], None, "ppsd-lab tasks"),
        (["/x/ppsd/__main__.py", "env"], "ppsd.__main__", "ppsd env"),
        (
            ["/x/rank0.py", "--out", "o"],
            "tests.stress.rank0",
            "python -m tests.stress.rank0 --out o",
        ),
        (["tools/gpu/step.py", "--tiny"], None, "python step.py --tiny"),
    ],
)
def test_the_command_that_ran(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], module: str | None, command: str
) -> None:
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", argv)

    assert provenance()["command"] == command
