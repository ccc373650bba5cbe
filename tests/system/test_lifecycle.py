"""An LLM in the middle of other people's programs: interrupts, forks, threads, launchers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from ppsd import LLM, SamplingParams
from ppsd.errors import ConfigError, PipelineError, PpsdError
from ppsd.worker.process import Supervisor, WorkerConfig
from tests.stress.lifecycle import PARAMS, PROMPT, Alarm, forks, interrupted_within
from tests.support.command import ppsd
from tests.support.faults import gone

ROOT = Path(__file__).parents[2]
TRANSPORTS = ("shared-memory", "inprocess", "distributed")
Open = Callable[..., LLM]


@pytest.fixture
def open_llm(tiny_model: Callable[[], Path]) -> Iterator[Open]:
    opened: list[LLM] = []

    def open_one(transport: str = "shared-memory", **settings: Any) -> LLM:
        fixed: dict[str, Any] = {"split": (3,), "head": "untrained", "plan": "off"}
        fixed |= {"threads_per_stage": 1, "dtype": "float32", "transport": transport}
        opened.append(LLM(str(tiny_model()), **fixed | settings))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


def tokens(llm: LLM, prompt: Any = PROMPT, params: SamplingParams = PARAMS) -> tuple[int, ...]:
    return llm.generate(prompt, params)[0].token_ids


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_request_after_an_interrupt_is_right(open_llm: Open, transport: str) -> None:
    llm = open_llm(transport)
    want = tokens(llm)
    hit = 0
    for turn in range(12):
        try:
            with interrupted_within(0.05 if turn % 3 else 0.005):
                for _ in llm.stream(PROMPT, PARAMS) if turn % 2 else [tokens(llm)]:
                    pass
        except Alarm:
            hit += 1
        assert tokens(llm) == want
    assert hit


@pytest.fixture
def on_start(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], object]], list[int]]:
    """Let a test act on each worker the moment it runs; gives the list of their process ids."""

    def prepare(act: Callable[[int], object]) -> list[int]:
        start, started = Supervisor.start, []

        def acting(supervisor: Supervisor, config: WorkerConfig) -> None:
            start(supervisor, config)
            started.append(supervisor.pids()[config.rank])
            act(started[-1])

        monkeypatch.setattr(Supervisor, "start", acting)
        return started

    return prepare


def test_an_interrupt_while_loading_leaves_no_worker(open_llm: Open, on_start: Any) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(Alarm), interrupted_within(0.05):
        open_until_interrupted(open_llm)
    assert gone(child.pid for child in set(psutil.Process().children()) - before)
    delays = iter((1e-4, 0.2))  # the worker still imports PyTorch
    started = on_start(lambda _: signal.setitimer(signal.ITIMER_REAL, next(delays)))
    for _ in range(2):
        with pytest.raises(Alarm), interrupted_within(3600.0):
            open_until_interrupted(open_llm)
        assert gone(child.pid for child in set(psutil.Process().children()) - before)
    assert len(started) == 2
    assert gone(started)


def open_until_interrupted(open_llm: Open) -> None:
    open_llm()
    time.sleep(5)  # it was open before


def test_next_after_close_is_one_sentence(open_llm: Open) -> None:
    llm = open_llm("inprocess")
    complete = llm.stream(PROMPT, SamplingParams(max_tokens=9, ignore_eos=True))
    next(complete)
    llm.generate(PROMPT, SamplingParams(max_tokens=1))  # after that, so all of it has come
    stream = llm.stream(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
    next(stream)
    llm.close()
    for reading in (complete, stream):
        with pytest.raises(PipelineError, match=r"^this LLM is closed$"):
            next(reading)
    with pytest.raises(PipelineError, match=r"^this LLM is closed$"):
        next(llm.stream(PROMPT))


def test_a_reader_that_stops_reading_stalls_nobody(open_llm: Open) -> None:
    llm = open_llm("inprocess")
    want = tokens(llm)
    stream = llm.stream(PROMPT, PARAMS)
    chunks = [next(stream)]
    assert tokens(llm) == want, "the same thread asks again without reading on"
    chunks += stream
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == want


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_forked_child_leaves_the_parents_llm_alone(
    tiny_model: Callable[[], Path], transport: str
) -> None:
    """It drops, closes, uses or reads it; what only an ending interpreter does comes below."""
    seen = forks(tiny_model(), transport, 4, ("drop", "close", "use", "read"))
    assert seen == {"forks": 4, "right": 8, "children in order": 4}


@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_a_forked_child_exits_in_the_middle(open_llm: Open, transport: str) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from tests.stress.lifecycle import forks
        print(forks(Path(sys.argv[1]), {transport!r}, 2, ("exit",)))
    """
    result = run_program(program, llm_model(open_llm))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Counter({'right': 4, 'forks': 2, 'children in order': 2})\n"


def llm_model(open_llm: Open) -> str:
    with open_llm("inprocess") as llm:
        return str(llm.layout.files.path)


def run_program(
    program: str, *arguments: str, launcher: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script of a user's own, with ppsd installed."""
    places = os.pathsep.join(map(str, (ROOT / "src", ROOT)))
    start = [sys.executable, *launcher] if launcher else [sys.executable, "-"]
    more = {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"} | environment
    text = textwrap.dedent(program)
    return subprocess.run(
        [*start, *arguments],
        input=None if launcher else text,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_workers_do_not_outlive_a_killed_parent_whose_child_lives(open_llm: Open) -> None:
    program = """
        import os, psutil, signal, sys, time
        from ppsd import LLM
        llm = LLM(sys.argv[1], split=(3,), head="untrained", plan="off", threads_per_stage=1)
        workers = [child.pid for child in psutil.Process().children()]
        if os.fork() == 0:
            os.close(1)
            os.close(2)
            time.sleep(60)
        print(psutil.Process().children()[-1].pid, *workers, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = run_program(program, llm_model(open_llm))
    assert result.returncode == -signal.SIGKILL
    child, *workers = map(int, result.stdout.split())
    assert len(workers) == 1
    assert gone(workers)
    os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("kinds", [TRANSPORTS[:2], ("distributed",) * 2, TRANSPORTS[::2]], ids=str)
def test_two_llms_at_once_are_both_right(open_llm: Open, kinds: tuple[str, str]) -> None:
    want = tokens(open_llm("inprocess"))
    first = open_llm(kinds[0])
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(open_llm, kinds[1]).result()
        assert [*threads.map(tokens, (first, second))] == [want] * 2
        threads.submit(first.close).result()
        assert tokens(second) == want
    third = open_llm(kinds[0])
    second.close()
    assert tokens(third) == want


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_callers_own_settings_stay(open_llm: Open, transport: str) -> None:
    def holdings() -> list[object]:
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [os.sched_getaffinity(0), torch.get_num_threads(), *fresh, handlers]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        before = holdings()
        with open_llm(transport) as llm:
            assert holdings() == before
            tokens(llm)
            assert holdings() == before
        assert holdings() == before
        ours = torch.ones(1)
        dist.all_reduce(ours)
        assert dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)


@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_a_worker_stopped_while_loading_is_named(
    open_llm: Open, on_start: Any, transport: str
) -> None:
    on_start(lambda pid: os.kill(pid, signal.SIGSTOP))
    with pytest.raises(PpsdError, match=r"stage 1 \(pid \d+\) has been stopped for 1 s"):
        open_llm(transport, timeout=1.0)


SCRIPT = """
import sys
from ppsd import LLM, SamplingParams
settings = {"plan": "off", "head": "untrained", "threads_per_stage": 1, "dtype": "float32"}
with LLM(sys.argv[1], stages=int(sys.argv[2]), transport=sys.argv[3], **settings) as llm:
    print(*llm.generate([5, 6, 7], SamplingParams(max_tokens=12, ignore_eos=True))[0].token_ids)
"""


@pytest.mark.parametrize("transport", ["auto", "distributed", "inprocess"])
def test_a_script_under_torchrun(open_llm: Open, tmp_path: Path, transport: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    few = SamplingParams(max_tokens=12, ignore_eos=True)
    want = " ".join(map(str, tokens(open_llm("inprocess"), [5, 6, 7], few)))
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script))
    model = llm_model(open_llm)
    result = run_program("", model, "2", transport, launcher=run)
    lines = [want] * (2 if transport == "inprocess" else 1)  # there each rank has its own
    assert (result.returncode, result.stdout.split("\n")[:-1]) == (0, lines), result.stderr
    if transport == "auto":
        refused = run_program("", model, "3", transport, launcher=run)
        assert refused.returncode != 0
        assert "stages must be the 2 processes that torchrun started" in refused.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "two"), ("MASTER_PORT", "99999"), ("GLOO_SOCKET_IFNAME", "nonsense0")],
)
def test_a_wrong_variable_of_a_launcher_is_one_sentence(
    tiny_model: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for variable, given in (torchrun | {name: value}).items():
        monkeypatch.setenv(variable, given)
    arguments = ["generate", "hello", "--raw", "--stages", "2", "--head", "untrained"]
    arguments += ["--plan", "off", "--transport", "distributed", "-m", str(tiny_model())]
    result = ppsd(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith(f"{name} must be ")
    assert "\n" not in str(result.exception)
    assert result.stdout == ""


def test_nothing_depends_on_the_clock_on_the_wall(
    open_llm: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An hour back and forth at every look, here and in the worker."""
    want = tokens(open_llm("inprocess"))
    jumping = "import random, time\ntime.time = lambda: 1.7e9 + random.uniform(-3600, 3600)\n"
    jumping += "time.time_ns = lambda: int(time.time() * 1e9)\n"
    (tmp_path / "sitecustomize.py").write_text(jumping)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 1.7e9 + random.uniform(-3600, 3600))
        patched.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
        for transport in TRANSPORTS:
            with open_llm(transport, timeout=20.0) as llm:
                completion = llm.generate(PROMPT, PARAMS)[0]
                assert completion.token_ids == want
                assert 0 <= completion.stats.decode_seconds < 20
