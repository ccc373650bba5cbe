"""The command in this process, a tiny model for it, and what plain decoding says."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable

import pytest

from ppsd import LLM, SamplingParams
from ppsd.cli.app import main
from tests.support.command import Result, Run
from tests.support.tiny_models import save_perfect_head


class Terminal(io.StringIO):
    """Typed text; a line that ends with ^C is interrupted there."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline(size)
        if line.endswith("\x03\n"):
            signal.raise_signal(signal.SIGINT)
        return line


@pytest.fixture
def ppsd(monkeypatch, capsys) -> Run:
    """Run ``ppsd`` with these arguments and this text on standard input, or ``typed``."""

    def run(*arguments: object, stdin: str = "", typed: bool = False, columns: int = 200) -> Result:
        monkeypatch.setattr(sys, "argv", ["ppsd", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Terminal(stdin) if typed else io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            code = main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory) -> Callable[..., list[str]]:
    """The flags of a tiny model cut in three, with a head that is right (1.0) or wrong (-1.0)."""

    def flags(sign: float = 1.0) -> list[str]:
        head = tmp_path_factory.mktemp("head")
        save_perfect_head(head, tiny_model(), 2, sign)
        flags = f"--model {tiny_model()} --head {head} --split 2,4 --dtype float64 --ignore-eos"
        return f"{flags} --transport inprocess --threads-per-stage 1 --no-lookup".split()

    return flags


@pytest.fixture
def expected(tiny_model) -> Callable[..., str]:
    """What plain decoding in one stage says."""

    def text(prompt, **params) -> str:
        settings = {"dtype": "float64", "stages": 1, "mode": "autoregressive"}
        with LLM(str(tiny_model()), **settings) as llm:
            sampling = SamplingParams(ignore_eos=True, **params)
            return llm.generate(prompt, sampling)[0].text

    return text
