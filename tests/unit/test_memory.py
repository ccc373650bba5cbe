"""Memory told is memory used: the estimate of plan and check, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ppsd import LLM, SamplingParams
from ppsd.model.source import resolve_model
from ppsd.plan.sizes import WORKER_BYTES
from tests.support.command import ppsd

MIB = 1 << 20


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def shares(before: set[psutil.Process]) -> list[int]:
    """Return proportional sets of this process and the workers that were not there ``before``."""
    workers = sorted(children() - before, key=lambda child: child.pid)
    found = []
    for process in (psutil.Process(), *workers):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                found.append(int(line.split()[1]) << 10)
    return found


needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")


@needs_linux
def test_told_used_and_planned_agree(tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    settings = {"dtype": "float32", "head": "untrained", "mode": "ppsd", "threads_per_stage": 1}
    before = children()
    with LLM(model, stages=3, split=(2, 4), **settings) as llm:
        llm.run([5, 7], SamplingParams(max_tokens=4, ignore_eos=True))
        told, counted = llm.memory, shares(before)
        assert len(told) == len(counted) == len(llm.memory_needed) == 3
        assert told == pytest.approx(counted, rel=0.05)
        # this process holds the tests as well; the workers nothing but their stages
        for used, needed in zip(told[1:], llm.memory_needed[1:], strict=True):
            assert 0.5 * needed < used <= needed
        planned = json.loads(
            ppsd("plan", "-m", model, "--workers", 3, "--split", "2,4", "--dtype", "float32",
                 "--json").stdout
        )["plans"][0]["memory_bytes"]  # fmt: skip
        assert planned == pytest.approx(llm.memory_needed, rel=1e-3)  # but for a head


@needs_linux
@pytest.mark.weights
def test_the_default_models_memory_is_what_was_estimated() -> None:
    """The estimate counts a full cache; what the request has not touched is not used yet."""
    if not resolve_model(None).is_gguf:
        pytest.skip("the embedded default model is not installed")
    before = children()
    with LLM(None, stages=2, threads_per_stage=1) as llm:
        llm.generate("Why is the sky blue?", SamplingParams(max_tokens=8))
        told, counted = llm.memory, shares(before)
        assert told == pytest.approx(counted, rel=0.05)
        spec, first = llm.layout.spec, llm.layout.bounds[1]
        keys = spec.num_kv_heads * spec.head_dim * llm.layout.dtype.itemsize
        row = 2 * keys * llm.layout.max_context
        untouched = (spec.num_layers - first) * row
        expected = llm.memory_needed[1] - untouched
        assert expected - 150 * MIB < told[1] <= expected + 20 * MIB


def test_stages_in_one_process_share_its_runtime(tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("llama"))
    settings = {"head": "none", "mode": "autoregressive", "plan": "off", "dtype": "float32"}
    with LLM(model, stages=2, transport="inprocess", **settings) as together:
        [needed] = together.memory_needed
        assert len(together.memory) == 1
    with LLM(model, stages=2, threads_per_stage=1, **settings) as apart:
        assert needed == sum(apart.memory_needed) - WORKER_BYTES
