"""One build of kernels.c for all processes and stages; PyTorch only where that is sure to stay."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, KernelError
from ppsd.model import kernel_build, kernels, sidecar
from ppsd.provenance import provenance

OTHER_LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
needs_compiler = pytest.mark.skipif(kernels.loaded() is None, reason="no C compiler")
Script = Callable[[str], Path]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a process that has decided nothing and came without a library."""
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PPSD_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_in_use", None)
    monkeypatch.setattr(kernel_build, "shipped", lambda machine: None)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this machine, compiled once."""
    made = kernel_build.compile_kernels(kernel_build.compiler(), kernel_build.target())
    assert isinstance(made, bytes)
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    path.write_bytes(made)
    return path


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Script:
    """Make a compiler of a shell script, in which ``$n`` counts its calls from 1.

    What it should write is named by ``$out``; returned is a directory with a file a call.
    """
    calls = tmp_path / "calls"
    calls.mkdir()

    def make(script: str) -> Path:
        program = tmp_path / "compiler"
        count = f'touch "{calls}/$$"; n=$(ls "{calls}" | wc -l)'
        output = 'for word do [ "$last" = -o ] && out=$word; last=$word; done'
        program.write_text(f"#!/bin/sh\n{count}\n{output}\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("CC", str(program))
        return calls

    return make


def decided_anew(monkeypatch: pytest.MonkeyPatch) -> kernels.Kernels:
    """What the next process would use."""
    monkeypatch.setattr(kernels, "_in_use", None)
    return kernels.in_use()


@needs_compiler
def test_a_library_is_built_once_and_named_by_its_bytes(
    monkeypatch: pytest.MonkeyPatch, compiler: Script, library: Path, cache: Path
) -> None:
    calls = compiler(f'cp {library} "$out"')
    first, second = kernels.in_use(), decided_anew(monkeypatch)
    assert first.library is not None
    assert second.library is not None
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:12]
    assert first.name == second.name
    assert first.name in (f"compiled-{digest}", f"packed-{digest}")
    assert len(list(calls.iterdir())) == 1
    assert len(list(cache.rglob(kernel_build.BUILT))) == 1


def test_targets_go_by_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_build.platform, "machine", lambda: "x86_64")
    best, avx2 = kernel_build.TARGETS
    for features, name in (
        (best.features, "avx512_bf16"),
        (best.features - {"avx512_bf16"}, "avx2"),
        (avx2.features | {"sse2"}, "avx2"),
        (avx2.features - {"fma"}, "native"),
        (frozenset(), "native"),
    ):
        monkeypatch.setattr(kernel_build, "_cpu_features", lambda features=features: features)
        assert kernel_build.target().name == name
    monkeypatch.setattr(kernel_build.platform, "machine", lambda: "aarch64")
    assert kernel_build.target().name == "native"


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="targets are of x86-64")
@pytest.mark.parametrize("machine", kernel_build.TARGETS, ids=lambda machine: machine.name)
def test_the_source_is_right_for_every_target(machine: kernel_build.Target) -> None:
    flags = (*machine.flags, *kernel_build.FLAGS, "-fsyntax-only")
    subprocess.run([*kernel_build.compiler(), *flags, kernel_build.SOURCE], check=True)


@needs_compiler
@pytest.mark.parametrize("mishap", ["exit 1", "exit 0", "kill -9 $$", ': > "$out"; exit'])
def test_one_mishap_changes_nothing(mishap: str, compiler: Script, library: Path) -> None:
    calls = compiler(f'[ $n -gt 1 ] || {{ {mishap}; }}\ncp {library} "$out"')
    assert kernels.in_use().library is not None
    assert len(list(calls.iterdir())) == 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", r"refused it on 2\d{3}-\d\d-\d\d: exit code 3"),
        ("echo a; echo 'kernels.c:7: error: no'; echo b; exit 1", r"kernels\.c:7: error: no"),
        ('echo x > "$out"', "what the compiler makes of it is unfit: .*"),
    ],
)
def test_a_refusal_is_told_and_remembered(
    script: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    compiler: Script,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = compiler(script)
    for _ in range(3):
        caplog.clear()
        assert decided_anew(monkeypatch).name == "PyTorch"
        assert kernels.loaded() is None
        [told] = caplog.messages
        assert re.match(f"bfloat16 is left to PyTorch, which is slower .*: .*{reason}", told)
    assert len(list(calls.iterdir())) == kernel_build.ATTEMPTS
    [entry] = cache.glob(re.search(r"\(it is tried again once .*/(.*) is gone\)$", told)[1])
    shutil.rmtree(entry)
    decided_anew(monkeypatch)
    assert len(list(calls.iterdir())) == 2 * kernel_build.ATTEMPTS


def test_without_a_compiler_pytorch_does_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert kernels.in_use().name == "PyTorch"
    assert caplog.messages[0].endswith(": there is no C compiler (no-such-compiler)")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("script", "reason"),
    [("kill -9 $$", "was ended by SIGKILL"), ("exit 0", "made no library"), ("sleep 77", "1 s")],
)
def test_what_may_end_otherwise_next_time_is_refused(
    script: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    compiler: Script,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PyTorch in its place would round differently, today and not tomorrow."""
    monkeypatch.setattr(kernel_build, "NOTICE_S", 0.2 if "sleep" in script else 9)
    monkeypatch.setattr(kernel_build, "BUILD_S", 1.0 if "sleep" in script else 9)
    compiler(script)
    for _ in range(2):  # and tried anew
        with pytest.raises(KernelError, match=f"{reason}; try again, or set PPSD_KERNELS=torch"):
            decided_anew(monkeypatch)
    told = [message for message in caplog.messages if "is compiling kernels.c, once" in message]
    assert len(told) == (2 if "sleep" in script else 0)


@pytest.mark.parametrize("end", [KernelError, KeyboardInterrupt])
def test_a_compiler_that_hangs_leaves_no_process(
    end: type[BaseException], monkeypatch: pytest.MonkeyPatch, compiler: Script
) -> None:
    if end is KernelError:
        monkeypatch.setattr(kernel_build, "NOTICE_S", 0.1)
        monkeypatch.setattr(kernel_build, "BUILD_S", 0.5)
    else:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
    compiler("sleep 4321 & sleep 4321")
    with pytest.raises(end):
        kernels.in_use()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    deadline = time.monotonic() + 10  # a killed process is gone a moment later
    while sleeping() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not sleeping()


def sleeping() -> list[bytes]:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    return [line for line in lines if b"4321" in line]


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


PROCESS = """
from ppsd.model.kernel_build import built, target
print(type(built(target(), lambda library: None)).__name__)
"""


def start() -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, text=True)


@needs_compiler
def test_processes_that_start_at_once_build_once(compiler: Script, library: Path) -> None:
    calls = compiler(f'sleep 2; cp {library} "$out"')
    children = [start() for _ in range(3)]
    assert {child.communicate(timeout=120)[0] for child in children} == {"bytes\n"}
    assert len(list(calls.iterdir())) == 1


@needs_compiler
def test_a_process_killed_while_it_builds_leaves_no_lock(
    compiler: Script, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(f'[ $n -gt 1 ] || exec sleep 5; cp {library} "$out"')
    child = start()
    deadline = time.monotonic() + 60
    while not list(calls.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    child.communicate()
    began = time.monotonic()
    assert decided_anew(monkeypatch).name != "PyTorch"
    assert time.monotonic() - began < kernel_build.BUILD_S / 4


@needs_compiler
@pytest.mark.parametrize("obstacle", ["read-only", "no directory", "a link", "a held lock"])
def test_the_cache_and_its_lock_are_never_a_must(
    obstacle: str,
    monkeypatch: pytest.MonkeyPatch,
    compiler: Script,
    library: Path,
    cache: Path,
) -> None:
    compiler(f'cp {library} "$out"')
    if obstacle == "no directory":
        cache.write_text("")
    elif obstacle == "read-only":
        monkeypatch.setenv("PPSD_CACHE", "/proc/ppsd")  # root may write anywhere else
    else:
        cache.mkdir()
        lock = cache / "kernels.lock"
        if obstacle == "a link":
            lock.symlink_to(cache / "elsewhere")
        else:
            monkeypatch.setattr(kernel_build, "BUILD_S", 0.3)
            held = lock.open("w")
            fcntl.flock(held, fcntl.LOCK_EX)
    assert kernels.in_use().library is not None
    assert not (cache / "elsewhere").exists()


@needs_compiler
def test_what_is_in_the_cache_needs_no_lock(
    monkeypatch: pytest.MonkeyPatch, compiler: Script, library: Path, cache: Path
) -> None:
    compiler(f'cp {library} "$out"')
    usual = kernels.in_use().name
    with (cache / "kernels.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(kernel_build, "_wait_for", None)
        assert decided_anew(monkeypatch).name == usual


@needs_compiler
@pytest.mark.parametrize("damage", ["torn", "anybody's", "another library"])
def test_a_damaged_file_is_built_anew(
    damage: str, monkeypatch: pytest.MonkeyPatch, compiler: Script, library: Path, cache: Path
) -> None:
    calls = compiler(f'cp {library} "$out"')
    usual = kernels.in_use().name
    [built] = cache.rglob(kernel_build.BUILT)
    if damage == "torn":
        built.write_bytes(built.read_bytes()[:1000])
    elif damage == "anybody's":
        built.chmod(0o777)
    else:
        built.write_bytes(OTHER_LIBRARY.read_bytes())
        digest = sidecar._digest(built.parent, {built.name: built.read_bytes()})
        (built.parent / sidecar.DIGEST).write_text(digest)
    assert decided_anew(monkeypatch).name == usual
    assert len(list(calls.iterdir())) == 2


def test_a_library_of_other_symbols_is_no_kernel() -> None:
    with pytest.raises(RuntimeError, match="a library without product"):
        kernels._load(OTHER_LIBRARY.read_bytes())


@needs_compiler
def test_what_came_with_the_package_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, library: Path, cache: Path
) -> None:
    made = library.read_bytes()
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernel_build, "shipped", lambda machine: made)
    assert kernels.in_use().library is not None
    assert not cache.exists()
    monkeypatch.setattr(kernel_build, "shipped", lambda machine: b"no library")
    assert decided_anew(monkeypatch).name == "PyTorch"


def test_settings_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc 'half")
    with pytest.raises(
        ConfigError, match=r"CC must be a compiler's command line, got \"cc 'half\""
    ):
        kernels.in_use()
    monkeypatch.setenv("CC", "")
    assert kernel_build.compiler() == ["cc"]
    monkeypatch.setenv("PPSD_KERNELS", "PyTorch")
    with pytest.raises(ConfigError, match="PPSD_KERNELS must be torch, or not set, got 'PyTorch'"):
        kernels.in_use()
    monkeypatch.setenv("PPSD_KERNELS", "torch")
    assert kernels.in_use() == kernels.Kernels("PyTorch")


def test_only_bfloat16_on_a_cpu_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "in_use", None)
    assert kernels.name("float32") == kernels.name("bfloat16", "cuda:1") == "PyTorch"


@needs_compiler
def test_a_stage_takes_what_it_is_handed(
    monkeypatch: pytest.MonkeyPatch, compiler: Script, library: Path
) -> None:
    compiler(f'cp {library} "$out"')
    own = kernels.in_use()
    monkeypatch.setenv("PPSD_CACHE", "/proc/ppsd")
    monkeypatch.setenv("CC", "no-such-compiler")
    for name, expected in ((own.name, own.name), ("PyTorch", "PyTorch")):
        monkeypatch.setattr(kernels, "_in_use", None)
        handed = None if name == "PyTorch" else os.dup(own.file or -1)
        kernels.use(name, handed)
        assert kernels.in_use().name == expected


def test_a_stage_refuses_other_kernels_and_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPSD_KERNELS", "torch")
    with pytest.raises(KernelError, match="has the kernels PyTorch, and rank 0 has compiled-1234:"):
        kernels.use("compiled-1234", None)
    monkeypatch.setattr(kernels, "_in_use", None)
    monkeypatch.setenv("PPSD_KERNELS", "fast")
    with pytest.raises(KernelError, match="has not the kernels compiled-1234 of rank 0: PPSD_KER"):
        kernels.use("compiled-1234", None)


def test_provenance_names_what_computes_bfloat16(
    monkeypatch: pytest.MonkeyPatch, compiler: Script
) -> None:
    def named(dtype: str | None) -> str | None:
        config = None if dtype is None else EngineConfig(dtype=dtype)
        return provenance(config)["bfloat16_kernels"]

    compiler("kill -9 $$")
    assert named(None) is None
    assert named("float32") is None
    monkeypatch.setenv("PPSD_KERNELS", "torch")
    assert named(None) == named("auto") == "PyTorch"
