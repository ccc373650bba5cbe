"""All stages compute with rank 0's kernels, or say why they will not, on every transport."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppsd import LLM, SamplingParams
from ppsd.errors import KernelError
from ppsd.model import kernel_build, kernels
from ppsd.worker.messages import Status
from tests.support.ports import free_port
from tests.support.tiny_models import FAMILIES, save_tiny

PROMPT = [9, 8, 7, 6, 5] * 8
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
COMPILED = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
SETTINGS = {"stages": 3, "head": "untrained", "mode": "ppsd", "plan": "off", "gate": False}
needs_kernels = pytest.mark.skipif(kernels.loaded() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sizes suit the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "wide", ("LlamaConfig", COMPILED))
        return save_tiny(tmp_path_factory.mktemp("wide"), "wide")


def tokens(model: Path, transport: str) -> tuple[int, ...]:
    with LLM(str(model), dtype="bfloat16", transport=transport, **SETTINGS) as llm:
        assert llm.layout.kernels == (kernels.in_use().name,) * 3
        return llm.generate(PROMPT, PARAMS)[0].token_ids


@needs_kernels
def test_stages_compute_with_what_rank_0_hands_down(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers could not make their own."""
    expected = tokens(model, "inprocess")
    monkeypatch.setenv("PPSD_CACHE", "/proc/ppsd")
    monkeypatch.setenv("CC", "no-such-compiler")
    for transport in ("shared-memory", "distributed"):
        assert tokens(model, transport) == expected
    monkeypatch.setattr(kernels, "_in_use", kernels.Kernels())
    by_pytorch = tokens(model, "inprocess")
    assert tokens(model, "shared-memory") == by_pytorch


@needs_kernels
@pytest.mark.parametrize("transport", ["shared-memory", "distributed"])
def test_a_stage_with_other_kernels_is_named_with_both(
    model: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = kernels.in_use().name
    monkeypatch.setattr(kernels, "name", lambda dtype, device="cpu": "compiled-of-old")
    said = f"stage 1: this stage has the kernels {own}, and rank 0 has compiled-of-old: "
    with pytest.raises(KernelError, match=said):
        LLM(str(model), dtype="bfloat16", transport=transport, **SETTINGS | {"stages": 2})


@needs_kernels
def test_a_stage_that_says_it_uses_others_is_refused(model: Path) -> None:
    with LLM(str(model), dtype="bfloat16", transport="inprocess", **SETTINGS) as llm:
        ready = Status(2, "ready", {"kernels": "PyTorch"})
        with pytest.raises(KernelError, match="stage 2 uses the kernels PyTorch, not "):
            llm._running._check_kernels([ready])


@needs_kernels
def test_hosts_with_other_kernels_refuse_each_other(model: Path, tmp_path: Path) -> None:
    """Two ranks as torchrun would start them, the second of which has PyTorch alone."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    options = ["--stages", "2", "--head", "untrained", "--plan", "off", "--mode", "ppsd"]
    options += ["--transport", "distributed", "--model", str(model), "-n", "4"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ppsd", "generate", "hi", *options],
            env=os.environ | world | {"RANK": str(rank), "PPSD_KERNELS": setting},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, setting in enumerate(("", "torch"))
    ]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    said = f"this stage has the kernels PyTorch, and rank 0 has {kernels.in_use().name}: "
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert f"ppsd: stage 1: {said}" in errors[0]
    assert f"ppsd: {said}" in errors[1]
    assert kernel_build.REMEDY in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
