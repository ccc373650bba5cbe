"""Compile kernels.c: when a wheel is made, or once on the machine that needs it.

hatch_build.py uses it, too, and without PyTorch. A library is for a target, a set of CPU features,
rather than for the CPU at hand: it has the same bits on every CPU with these features.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from ppsd.errors import ConfigError, KernelError
from ppsd.model.sidecar import cache_root, cached

HERE = Path(__file__).parent
SOURCE, PRODUCTS = HERE / "kernels.c", HERE / "products.h"
BUILT, REFUSED = "kernels.so", "refused.txt"  # what a cache entry consists of: one of them
FLAGS = (
    *("-O3", "-ffp-contract=fast", "-fopenmp"),
    *("-shared", "-fPIC", "-fno-semantic-interposition"),
)
NOTICE_S = 5.0  # a build takes 2 s, so a longer one deserves a word
BUILD_S = 180.0
ATTEMPTS = 2  # a compiler may fail by chance, too
POLL_S = 0.05
REMEDY = "set PPSD_KERNELS=torch to decode with PyTorch, which is slower and rounds differently"

LOG = logging.getLogger(__name__)

Check = Callable[[bytes], object]  # raises OSError or RuntimeError for a library unfit for use


@dataclass(frozen=True)
class Target:
    """CPUs that a library is made for: those with all ``features``, as /proc/cpuinfo has them."""

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


def _x86_64(name: str, extensions: dict[str, str]) -> Target:
    """Return the target of CPUs with ``extensions``: the compiler's name and the system's."""
    flags = tuple(f"-m{extension}" for extension in extensions)
    return Target(name, frozenset(extensions.values()), flags)


_AVX2 = {"avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2"}
_AVX512 = {f"avx512{part}": f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl")}
TARGETS = (  # the best first
    _x86_64("avx512_bf16", _AVX2 | _AVX512 | {"avx512bf16": "avx512_bf16"}),
    _x86_64("avx2", _AVX2),
)


def target() -> Target:
    """Return the target to use on this machine; one for this very CPU where none other fits."""
    features = _cpu_features()
    if platform.machine() == "x86_64":
        for known in TARGETS:
            if known.features <= features:
                return known
    return Target("native", features, ("-march=native",))


def _cpu_features() -> frozenset[str]:
    lines: list[str] = []
    with contextlib.suppress(OSError):  # not on every system
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


def shipped(machine: Target) -> bytes | None:
    """Return the library for ``machine`` that came with this package, if any."""
    file = shipped_file(machine)
    return file.read_bytes() if file.is_file() else None


def shipped_file(machine: Target) -> Path:
    """Return where the library for ``machine`` lies in this package.

    The name has a digest of the sources, so that a library never outlives a change of them.
    """
    flags = json.dumps([machine.flags, FLAGS]).encode()
    identity = SOURCE.read_bytes() + PRODUCTS.read_bytes() + flags
    digest = hashlib.sha256(identity).hexdigest()[:12]
    return HERE / f"kernels-{machine.name}-{digest}.so"


def compiler() -> list[str]:
    """Return the C compiler's command: $CC, else cc. Raises ConfigError for what is no command."""
    text = os.environ.get("CC", "")
    try:
        return shlex.split(text) or ["cc"]
    except ValueError as error:
        raise ConfigError("CC", text, "a compiler's command line") from error


def built(machine: Target, check: Check) -> bytes | str:
    """Return the library that this machine's compiler makes for ``machine``, or why there is none.

    Both are kept in the cache, so a compiler runs once, in one of the processes that ask at the
    same time. Raises KernelError when the next try may end otherwise (see ``compile_kernels``).
    """
    command = compiler()
    program = shutil.which(command[0])
    if program is None:
        return f"there is no C compiler ({command[0]})"
    key, read = _key(command, program, machine), partial(_read, check)
    with contextlib.suppress(LookupError):  # what is there already needs no lock
        made = cached(SOURCE, key, _absent, _write, read)
        again = f" (it is tried again once {cache_root()}/*-{key} is gone)"
        return made if isinstance(made, bytes) else made + again
    with _alone():
        return cached(SOURCE, key, partial(compile_kernels, command, machine, check), _write, read)


def _absent() -> bytes | str:
    raise LookupError("not in the cache")


def _key(command: list[str], program: str, machine: Target) -> str:
    """Return a name for what this compiler makes for ``machine``."""
    status = Path(program).stat()
    features = sorted(machine.features) if machine.name == "native" else ()
    parts = (*command, status.st_size, status.st_mtime_ns, *machine.flags, *FLAGS, *features)
    identity = f"{shipped_file(machine).name} {platform.machine()} {json.dumps(parts)}"
    return f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock of this user's processes, if there is one: it saves work, nothing rests on it."""
    try:
        place = cache_root()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(place / "kernels.lock", flags, 0o600)
    except OSError:  # a cache that cannot be written, or no home for one
        yield
        return
    try:
        _wait_for(lock)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int) -> None:
    """Take the lock; go on without it after BUILD_S, or on a file system that has none."""
    start, told = time.monotonic(), False
    while (waited := time.monotonic() - start) < BUILD_S:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_S)
        except OSError:  # a file system without locks
            return None
        if waited > NOTICE_S and not told:
            LOG.warning("waiting for another process that compiles kernels.c")
            told = True
    return None


def compile_kernels(
    command: list[str], machine: Target, check: Check = lambda library: None
) -> bytes | str:
    """Return the library for ``machine``, or why the compiler refuses it or ``check`` does.

    Raises KernelError when the compiler is killed, takes longer than BUILD_S or leaves no file.
    That is no property of this machine, so nothing that decides a result's bits may rest on it.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            made = _checked(_attempt(command, machine), check)
        except TimeoutError as error:
            raise KernelError(_broken(f"{command[0]} took more than {error} s")) from error
        except OSError as error:
            if attempt == ATTEMPTS:
                raise KernelError(_broken(str(error))) from error
        else:
            if isinstance(made, bytes) or attempt == ATTEMPTS:
                return made
    raise AssertionError  # the last attempt returns or raises


def _checked(made: bytes | str, check: Check) -> bytes | str:
    try:
        if isinstance(made, bytes):
            check(made)
    except (OSError, RuntimeError) as error:
        return f"what the compiler makes of it is unfit: {error}"
    return made


def _broken(problem: str) -> str:
    return f"kernels.c could not be compiled: {problem}; try again, or {REMEDY}"


def _attempt(command: list[str], machine: Target) -> bytes | str:
    """Run the compiler once. Raises OSError where it did not come to a result of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        library, log = Path(work) / BUILT, Path(work) / "log"
        arguments = [*machine.flags, *FLAGS, str(SOURCE), "-o", str(library), "-lm"]
        with log.open("wb") as output:
            child = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"TMPDIR": work, "LC_ALL": "C"},
                process_group=0,  # its children must end with it
            )
            code = _ending(child, command[0])
        if code < 0:
            name = signal.Signals(-code).name
            raise ChildProcessError(f"{command[0]} was ended by {name}")
        if code > 0:
            return f"{command[0]} refused it on {date.today()}: {_reason(log, code)}"
        if not library.is_file():
            raise FileNotFoundError(f"{command[0]} made no library")
        return library.read_bytes()


def _ending(child: subprocess.Popen[bytes], name: str) -> int:
    """Return a compiler's exit code, and say so when it takes long; it is killed if we leave."""
    try:
        try:
            return child.wait(NOTICE_S)
        except subprocess.TimeoutExpired:
            LOG.warning("%s is compiling kernels.c, once; %g s at most", name, BUILD_S)
        try:
            return child.wait(BUILD_S - NOTICE_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{BUILD_S:g}") from None
    except BaseException:  # an interrupt, too: no compiler is to be left behind
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise


def _reason(log: Path, code: int) -> str:
    """Return the line of a compiler's output that says most."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:] or [f"exit code {code}"])[0][:200]


def _write(made: bytes | str, directory: Path) -> None:
    if isinstance(made, bytes):
        (directory / BUILT).write_bytes(made)
    else:
        (directory / REFUSED).write_text(made)


def _read(check: Check, files: Mapping[str, bytes]) -> bytes | str:
    """Return what a cache entry holds; a library unfit for use raises, and so is built anew."""
    if REFUSED in files:
        return files[REFUSED].decode()
    check(files[BUILT])
    return files[BUILT]
