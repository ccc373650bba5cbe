"""Find the mutants that mypy refuses, as `make check` runs it: tests need not see them.

mutmut writes a module's mutants as functions into one file, so one run of mypy checks them all, and
the line of an error tells the mutant. A mutant is checked beside the function that it comes from:
what that function alone declares, such as a type that mypy infers from the first value of an
attribute, holds for its mutants. An error that mypy also finds in mutmut's copy of the unchanged
function is none of a mutant's, nor is an error outside of all mutants.
"""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ORIGINAL = "orig"  # in place of a mutant's number


class Error(NamedTuple):
    """An error in one of the functions that mutmut has written, ``name`` with the module's."""

    name: str
    message: str


def find_refused(mutants: Path) -> set[str]:
    """Return the names of mutants, written below ``mutants``, that mypy refuses."""
    messages: dict[str, set[str]] = defaultdict(set)
    for name, message in find_errors(mutants):
        messages[name].add(message)
    return {
        name
        for name, found in messages.items()
        if found - messages.get(f"{name.rpartition('_')[0]}_{ORIGINAL}", set())
        and not name.endswith(f"_{ORIGINAL}")
    }


def find_errors(mutants: Path) -> Iterator[Error]:
    """Yield mypy's errors in mutants and in the copies of unchanged functions."""
    command = [sys.executable, "-m", "mypy", "--output=json", "-p", "ppsd"]
    result = subprocess.run(command, cwd=mutants, capture_output=True, text=True)
    if result.returncode not in (0, 1):  # 1: it has found errors
        raise SystemExit(f"mypy cannot check the mutants:\n{result.stdout}{result.stderr}")
    functions: dict[str, Functions] = {}
    for line in result.stdout.splitlines():
        report = json.loads(line)
        if report["severity"] == "error":
            file = report["file"]
            if file not in functions:
                functions[file] = Functions(mutants / file, mutants / "src")
            if name := functions[file].at(report["line"]):
                yield Error(name, report["message"])


class Functions:
    """The lines of the functions that mutmut has written into a file."""

    def __init__(self, file: Path, root: Path) -> None:
        self._module = ".".join(file.relative_to(root).with_suffix("").parts)
        index = file.with_name(f"{file.name}.spans")
        spans = json.loads(index.read_text())["spans"] if index.exists() else {}
        self._spans = sorted((*lines, name) for name, lines in spans.items())

    def at(self, line: int) -> str | None:
        """Return the name of the function that a line belongs to."""
        place = bisect_right(self._spans, line, key=lambda span: span[0]) - 1
        if place < 0 or line > self._spans[place][1]:
            return None
        return f"{self._module}.{self._spans[place][2]}"
