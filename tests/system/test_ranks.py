"""Ranks that are started one by one, as on several hosts: each with files of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ppsd.cli import app
from tests.support.faults import Forked, plant
from tests.support.ports import free_port
from tests.support.tiny_models import save_perfect_head
from tests.system.test_cli import ENVIRONMENT, PATIENCE_S, PPSD

FIXED = "--dtype float64 --threads-per-stage 1 --transport distributed -n 12 --ignore-eos --json"


def start(flags: str, variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a rank."""
    return subprocess.Popen(
        [*PPSD, "generate", "the quick brown fox", *FIXED.split(), *flags.split()],
        env=ENVIRONMENT | variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def ranks():
    """Start a rank for each of some flags and variables; return what each said, by rank."""
    started: list[subprocess.Popen[str]] = []

    def run(*each: tuple[str, dict[str, str]]) -> list[tuple[int, str, str]]:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, (flags, variables) in enumerate(each):
            own = meeting | variables | {"WORLD_SIZE": str(len(each)), "RANK": str(rank)}
            started.append(start(flags, own))
        said = [process.communicate(timeout=PATIENCE_S) for process in started]
        return [(p.returncode, *words) for p, words in zip(started, said, strict=True)]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_rank_0_hears_at_once_why_another_does_not_take_part(ranks, tiny_model) -> None:
    flags = "--stages 2 --head none --init-timeout 100 --model"
    begun = time.monotonic()
    said = ranks((f"{flags} {tiny_model()}", {}), (f"{flags} {tiny_model('qwen2')}", {}))
    assert time.monotonic() - begun < 100
    assert [code for code, _, _ in said] == [1, 1], said
    reason = "all ranks need the same model"
    assert said[0][2].startswith("ppsd: rank 1 does not take part: rank 1 has ")
    for _, _, words in said:
        assert reason in words
        assert words.count("\n") == 1


@pytest.mark.parametrize("there", [True, False])
def test_each_rank_finds_heads_by_name_where_it_keeps_them(
    ranks, tiny_model, tmp_path, there
) -> None:
    """Rank 1 needs one for the boundary behind it; rank 0 has both, at another place."""
    each = []
    for rank in range(3):
        place: Path = tmp_path / str(rank)
        place.mkdir()
        if rank == 0 or there:
            save_perfect_head(place / "exit-2", tiny_model(), 2, 0.3)
            save_perfect_head(place / "exit-4", tiny_model(), 4)
        flags = f"--model {tiny_model()} --split 2,4 --head exit-2 --heads auto --rows 4 --no-gate"
        # Long enough that some opinion comes before its verdict, however busy the cores are.
        each.append((f"{flags} -n 100 --init-timeout 100", {"PPSD_HEAD_DIR": str(place)}))
    (code, out, words), *others = ranks(*each)
    if there:
        assert [code, *(other[0] for other in others)] == [0, 0, 0], (words, others)
        assert json.loads(out)["counts"]["opinions"] > 0
    else:
        assert code == 1
        assert words.splitlines()[-1].startswith("ppsd: rank 1 does not take part: ")
        assert "exit-4" in words
        assert "exit-4" in others[0][2]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_ends_a_rank_that_waits_for_others(tiny_model, rank: int) -> None:
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    about |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    flags = f"--stages 2 --head none --init-timeout {10 * PATIENCE_S} --model {tiny_model()}"
    process = start(flags, about)
    try:
        waits_idly(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, words.strip()) == (130, "")
    finally:
        process.kill()
        process.wait()


def waits_idly(process: psutil.Process) -> None:
    """Return once a process has taken little time of a processor for a second."""
    before = -1.0
    while (spent := sum(process.cpu_times()[:2])) - before > 0.3:
        before = spent
        time.sleep(1)


def forked(flags: str, variables: dict[str, str], folder: Path) -> Forked:
    """Start a rank from here, in milliseconds; the first further stage works slowly."""

    def program() -> int:
        plant(2, "decode", "slow")
        os.environ.update(variables)
        sys.argv = ["ppsd", "generate", "hello", *flags.split()]
        return app.main()

    with (
        open(os.devnull) as nothing,
        (folder / "out").open("w") as out,
        (folder / "err").open("w") as err,
    ):
        return Forked(program, nothing.fileno(), out.fileno(), err.fileno())


@pytest.mark.parametrize(
    ("number", "codes", "word"),
    [(signal.SIGINT, [130, 0, 0], ""), (signal.SIGKILL, [-9, 1, 1], "is gone")],
)
def test_ranks_leave_in_peace_only_when_rank_0_says_goodbye(
    tiny_model, tmp_path, number, codes, word
) -> None:
    """Also those behind a stage that works, through which no word would come in time."""
    flags = f"--model {tiny_model()} --split 2,4 --head untrained --raw --dtype float64 -n 400"
    flags += " --ignore-eos --no-gate --threads-per-stage 1 --transport distributed"
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    folders = [tmp_path / str(rank) for rank in range(3)]
    started: list[Forked] = []
    try:
        for rank, folder in enumerate(folders):
            folder.mkdir()
            started.append(forked(flags, about | {"RANK": str(rank)}, folder))
        deadline = time.monotonic() + PATIENCE_S
        while not (folders[0] / "out").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(started[0].pid, number)
        said = [process.wait(PATIENCE_S) for process in started]
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
    words = [(folder / "err").read_text() for folder in folders]
    assert said == codes, words
    for text in words[1:]:
        assert word in text
        assert bool(text) == bool(word)
