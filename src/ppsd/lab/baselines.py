"""PPSD beside what else one could run on the same cores: other decoders, and one process.

All are asked in turns, task by task, in greedy decoding and (but for llama.cpp, which keeps its
file's quantisation) one dtype. Each other decoder has a process of its own that may use all cores
of the pipeline; while one works the others sleep.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ppsd.engine.llm import LLM
from ppsd.errors import PpsdError
from ppsd.lab.rivals.rivals import DEL, DEL_HEADS, FIXED, KNN_SSD
from ppsd.lab.runner import Cell, Measurement
from ppsd.lab.tasks import TaskBench, Variant, digest
from ppsd.measure.workload import Task
from ppsd.types import SamplingParams

SETTLE_S = 1.5  # after so long without work a stage sleeps between looks at its queue
STDERR_TAIL = 2000
GREEDY = "greedy"
GAMMAS = (1, 2, 4)  # draft lengths in one process, where draft-then-verify has no pipeline


@dataclass(frozen=True)
class Outsider:
    """A decoder in a process of its own; ``options`` are those of transformers' generate.

    ``one_stage``: it gets the threads and cores of one stage, not of all.
    """

    name: str
    kind: str = "transformers"
    options: dict[str, Any] = field(default_factory=dict)
    one_stage: bool = False


def outsiders(exit_layer: int, gguf: bool, heads: bool = False) -> list[Outsider]:
    """Return the outsiders that can run here: llama.cpp only if installed, for a GGUF file.

    ``heads``: the model has trained heads, which some rivals need.
    """
    from ppsd.lab.outsider import PROMPT_LOOKUP_TOKENS

    if gguf and importlib.util.find_spec("accelerate") is None:
        raise PpsdError(
            "transformers reads GGUF files only with the package accelerate; "
            "install it by `pip install 'ppsd-llm[lab]'`"
        )
    found = [
        Outsider("one process", kind="ppsd"),
        Outsider("linears alone", kind="linears"),
        Outsider("linears alone, one stage's threads", kind="linears", one_stage=True),
        Outsider("transformers"),
        Outsider("transformers early exit", options={"assistant_early_exit": exit_layer}),
        Outsider(
            "transformers prompt lookup", options={"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
        ),
    ]
    found += [Outsider(name, kind="rival") for name in (DEL, KNN_SSD)]
    if heads:
        fixed = [f"{FIXED}{gamma}" for gamma in GAMMAS]
        found += [Outsider(name, kind="rival") for name in (DEL_HEADS, *fixed)]
    if gguf and importlib.util.find_spec("llama_cpp") is not None:
        found.append(Outsider("llama.cpp", kind="llama.cpp"))
    return found


class OutsiderProcess:
    """A running outsider on ``cores`` (any, when empty); ``close`` ends it."""

    def __init__(
        self, outsider: Outsider, path: str, dtype: str, threads: int, cores: Sequence[int] = ()
    ) -> None:
        self.name = outsider.name
        self._output: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ppsd.lab.outsider"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
        )
        record = {"kind": outsider.kind, "path": path, "dtype": dtype, "threads": threads}
        more = {"name": outsider.name, "options": outsider.options, "cores": list(cores)}
        self.ask(record | more)

    def ask(self, record: dict[str, Any]) -> dict[str, Any]:
        """Send one line and return the answer; raises PpsdError when the process ends instead."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(record) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # its last words come below
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._output.seek(0)
            words = self._output.read()[-STDERR_TAIL:].strip()
            raise PpsdError(f"{self.name} ended with code {self._child.returncode}:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it; may be called twice."""
        self._child.kill()
        self._child.wait()
        self._output.close()


class BaselineBench:
    """Measures the pipeline's variants and outsiders on the same tasks."""

    def __init__(
        self,
        llm: LLM,
        own: Sequence[Variant],
        others: Sequence[OutsiderProcess],
        tasks: Sequence[Task],
        params: SamplingParams,
    ) -> None:
        self._own = TaskBench(llm, own, tasks, {GREEDY: params})
        self._prompts = {task.id: llm.encode(task.messages) for task in tasks}
        self._others = {other.name: other for other in others}
        self._max_tokens = params.max_tokens
        self._last = ""

    def measure(self, cell: Cell) -> Measurement:
        """Run one task in one variant, when those before have gone to sleep."""
        asked = cell.variant if cell.variant in self._others else ""
        if asked != self._last:
            time.sleep(SETTLE_S)
        self._last = asked
        return self._outside(cell) if asked else self._own.measure(cell)

    def _outside(self, cell: Cell) -> Measurement:
        prompt = self._prompts[cell.task.rpartition(" @ ")[0]]
        reply = self._others[cell.variant].ask({"ids": prompt, "max_tokens": self._max_tokens})
        return Measurement(
            *cell,
            tokens=reply["timed_tokens"],
            seconds=reply["seconds"],
            first_seconds=reply["first_seconds"],
            counts=dict.fromkeys(("drafted", "judged", "accepted", "discarded", "resyncs"), 0),
            hits="",
            details={"output": None if reply["ids"] is None else digest(reply["ids"])},
        )
