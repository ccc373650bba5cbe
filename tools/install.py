"""Run ``pip install`` with one growing line of progress; pip's own words come only if it fails.

Usage: python tools/install.py ARGUMENTS, by the Python of the environment to install into.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import deque
from importlib.metadata import version

QUIET = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
RAW_PROGRESS = (24, 1)  # the first pip that tells its progress to another program
KEPT_LINES = 40
EVERY_S = {True: 0.2, False: 15.0}  # by whether a terminal shows it
FILE = re.compile(r"Downloading \S*?([A-Za-z0-9_.]+?)-\d\S*")
PROGRESS = re.compile(r"Progress (\d+) of (\d+)")
UNPACKING = "Installing collected packages"


class Line:
    """One line that is written over on a terminal, and now and then a new one elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next = 0.0

    def show(self, text: str, *, now: bool = False) -> None:
        """Show a text, unless another was shown a moment ago."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S[self._terminal]
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
        else:
            print(text, flush=True)

    def clear(self) -> None:
        """Leave nothing on a terminal."""
        if self._terminal:
            print("\r\x1b[K", end="", flush=True)


def pip(*arguments: str) -> subprocess.Popen[str]:
    """Start pip with its output as one stream of lines."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "pip", "install", *arguments],
        env=os.environ | QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def follow(process: subprocess.Popen[str]) -> int:
    """Show what pip does until it ends; return its exit status."""
    line, name, said = Line(), "", deque[str](maxlen=KEPT_LINES)
    assert process.stdout is not None
    for text in process.stdout:
        if progress := PROGRESS.search(text):
            done, total = (int(part) / 1e6 for part in progress.groups())
            line.show(f"downloading {name}: {done:.0f} of {total:.0f} MB")
            continue
        said.append(text)
        if file := FILE.search(text):
            name = file[1]
        elif UNPACKING in text:
            line.show("unpacking, a minute or two", now=True)
    line.clear()
    status = process.wait()
    if status:
        sys.stderr.writelines(said)
    return status


def main(arguments: list[str]) -> int:
    """Install what the arguments name; a pip that is too old to tell its progress is renewed."""
    if tuple(map(int, version("pip").split(".")[:2])) < RAW_PROGRESS and (
        status := follow(pip("--quiet", "--upgrade", "pip"))
    ):
        return status
    return follow(pip("--progress-bar", "raw", *arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
