"""Search the tests for mutants that survive: `python tools/mutation.py --minutes 20`.

mutmut writes the mutants (extra `mutation`), all of a module into one file, chosen by name at run
time. This script runs them. Each file of tests that belong to a module has a process, which
collects them once, runs them once without a mutant, and then gives each mutant a fork of itself. So
neither PyTorch nor a test is imported again, and what a check compares with is made without a
mutant. A mutant meets only the tests that call its function, the fastest first, and a slower file
only if it survived the faster ones.

Each file must first pass in a fork without a mutant, or nothing that fails in a fork says anything
of mutants: the search refuses to go on. What a fork cannot use, such as an engine with threads, is
made anew in each. Mutants that mypy refuses are not run (tools/mutation_types.py): `make check`
kills them.

Mutants of a module are taken in the order of a hash of their names, as many as the budget allows:
the sample is random, and a later run goes on where this one stopped unless the module has changed.
The result file keeps the counts and the commit of each module, each survivor with its difference,
and the argument that somebody wrote beside it; a survivor without an argument is tried again. A
mutant whose function none of these tests calls is counted as uncovered: slower tests may well call
it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from mutation_tests import TESTS
from mutation_types import find_refused

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "exactness" / "mutation.json"
MIXED = ROOT / "mutants" / "mixed"
OUTCOMES = ROOT / "mutants" / "outcomes.json"  # of single mutants, to go on from
SLOW_S = 30.0  # of processor time: a longer test is left out, if not by --longest a shorter one
RECORDED = 20  # mutants after which the result is written
PATIENCE = 3  # times as long as without a mutant, and then some, before a mutant counts as endless
NAP_S = 0.01  # between looks at a mutant
KILLED, SURVIVED, UNCOVERED, ENDLESS = "killed", "survived", "uncovered", "timeout"


class Search:
    """A pytest plugin that runs the collected tests once for each mutant it hears of, in a fork."""

    def __init__(self, asked: Connection, longest: float) -> None:
        self._asked = asked
        self._longest = longest
        self._times: dict[str, float] = {}  # of tests, without a mutant
        self._called: dict[str, set[str]] = {}  # functions, by test

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop over the tests."""
        self._observe(session)
        items = [item for item in session.items if item.nodeid in self._times]
        if items and self._try("", items) != SURVIVED:
            session._setupstate.teardown_exact(None)  # each fork makes fixtures of the module anew
            if (outcome := self._try("", items, quiet=False)) != SURVIVED:
                self._asked.send(f"without a mutant, a fork of these tests is {outcome}")
                return True
        self._asked.send(self._times)
        while mutant := self._asked.recv():
            function = mutant.rpartition("__mutmut_")[0]
            names = [name for name in self._times if function in self._called[name]]
            items = [item for item in session.items if item.nodeid in names]
            items.sort(key=lambda item: self._times[item.nodeid])
            self._asked.send(self._try(mutant, items) if items else UNCOVERED)
        return True

    def _observe(self, session: pytest.Session) -> None:
        """Run all tests without a mutant; note how long each takes and what it calls.

        Fixtures of the module stay, so what a check compares with is made without a mutant. No
        test is kept set up itself: pytest would not give it its fixtures again.
        """
        from mutmut.state import state

        become("stats")
        first = session.items[0]  # comes twice: at its first time modules are imported
        for item, after in [(first, first.parent), *pairs(session.items, first.parent)]:
            start = time.process_time()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            if (seconds := time.process_time() - start) < self._longest:
                self._times[item.nodeid] = seconds
            self._called.setdefault(item.nodeid, set()).update(state()._stats)
            state()._stats.clear()
        become("")

    def _try(self, mutant: str, items: list[pytest.Item], *, quiet: bool = True) -> str:
        if not (pid := os.fork()):
            os.setsid()
            become(mutant)
            if quiet:
                silence()
            for item, after in pairs(items, None):
                item.ihook.pytest_runtest_protocol(item=item, nextitem=after)
            os._exit(0)
        limit = 5 + PATIENCE * sum(self._times[item.nodeid] for item in items)
        for _ in range(round(limit / NAP_S)):  # no clock: it goes on while all this is stopped
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return KILLED if status else SURVIVED
            time.sleep(NAP_S)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return ENDLESS

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """End a fork at the first test that fails."""
        if report.failed:
            print(report.longreprtext, file=sys.stderr)
            os._exit(1)


class File:
    """A process that has collected tests, started when first asked."""

    def __init__(self, tests: str, longest: float) -> None:
        self._tests = tests
        self._longest = longest
        self._pid = 0

    def ask(self, mutant: str) -> str:
        """Return what becomes of a mutant."""
        if not self._pid:
            self._start()
        self._pipe.send(mutant)
        outcome: str = self._pipe.recv()
        return outcome

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        if not (pid := os.fork()):
            self._pipe.close()
            sys.path.insert(0, str(MIXED.absolute()))
            os.chdir("mutants")
            options = ["-qq", "-s", "-p", "no:cacheprovider", "-p", "no:warnings"]
            options += ["--hypothesis-profile=unshrunk", "--timeout=0"]
            with contextlib.suppress(EOFError):  # the search was stopped
                pytest.main(
                    [*options, f"tests/{self._tests}"], plugins=[Search(theirs, self._longest)]
                )
            os._exit(0)
        theirs.close()
        self._pid = pid
        try:
            times = self._pipe.recv()
        except EOFError:
            times = "cannot be run without a mutant"
        if isinstance(times, str):
            raise SystemExit(f"{self._tests}: {times}")
        print(f"{self._tests}: {sum(times.values()):.1f} s for {len(times)} tests", flush=True)

    def end(self) -> None:
        """Let the process go."""
        if self._pid:
            self._pipe.send("")
            os.waitpid(self._pid, 0)


def become(mutant: str) -> None:
    """Make this process run as ``mutant``."""
    from mutmut.mutation.trampoline import set_mutant_under_test

    set_mutant_under_test(mutant)


def silence() -> None:
    """Send all output of this process nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def pairs(
    items: list[pytest.Item], last: pytest.Collector | None
) -> Iterator[tuple[pytest.Item, Any]]:
    """Yield each test with the next one, for which fixtures are kept; ``last`` follows them all."""
    return zip(items, [*items[1:], last], strict=True)


def write_mutants() -> dict[str, list[str]]:
    """Write what is new or has changed below mutants/; return names by module, in their order."""
    from mutmut import __main__ as mutmut
    from mutmut.configuration import config
    from mutmut.mutation.data import SourceFileMutationData

    become("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    config().only_mutate = [f"src/ppsd/{module}.py" for module in TESTS]
    with contextlib.redirect_stdout(None):
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.setup_source_paths()
        mutmut.create_mutants(1)
    become("")
    names = {}
    for module in TESTS:
        data = SourceFileMutationData(path=Path(f"src/ppsd/{module}.py"))
        data.load()
        names[module] = sorted(data.exit_code_by_key, key=digest)
    return names


def mix(modules: Sequence[str]) -> None:
    """Link a package in which these modules alone have mutants: their functions take long to call.

    So a search of one module does not wait for calls in all the others.
    """
    shutil.rmtree(MIXED, ignore_errors=True)
    mutated = {Path(f"src/ppsd/{module}.py") for module in modules}
    for file in Path("src/ppsd").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            link = MIXED / file.relative_to("src")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(("mutants" / file if file in mutated else file).absolute())


def digest(name: str) -> str:
    """Return a number for a mutant that says nothing of it."""
    return hashlib.sha256(name.encode()).hexdigest()


def search(files: Sequence[File], mutant: str) -> str:
    """Return the outcome of a mutant: it survives a file if it survives all that call it."""
    outcome = UNCOVERED
    for file in files:
        found = file.ask(mutant)
        if found in (KILLED, ENDLESS):
            return found
        outcome = SURVIVED if SURVIVED in (found, outcome) else UNCOVERED
    return outcome


def difference(mutant: str, module: str) -> str:
    """Return the lines that a mutant takes away and adds."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    lines = get_diff_for_mutant(mutant, path=Path(f"src/ppsd/{module}.py")).splitlines()[2:]
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def source_hash(module: str) -> str:
    """Return what changes with a module's source: its mutants' numbers then mean others."""
    return hashlib.sha256(Path(f"src/ppsd/{module}.py").read_bytes()).hexdigest()[:16]


def record(
    outcomes: dict[str, Any],
    names: dict[str, list[str]],
    refused: set[str],
    arguments: dict[str, str],
) -> None:
    """Write the outcomes, and the result file: counts of every module, and what survived.

    ``arguments`` are those that the file had before, also of what has not been tried again yet.
    """
    OUTCOMES.write_text(json.dumps(outcomes))
    arguments.update(read_arguments())
    modules = read_result()
    for module in (name for name in TESTS if outcomes.get(name, {}).get("of")):
        of_mutants = outcomes[module]["of"]
        differences = {
            mutant: difference(mutant, module)
            for mutant, outcome in of_mutants.items()
            if outcome == SURVIVED
        }
        modules[module] = {
            "commit": commit(),
            "mutants": len(names[module]),
            "refused by mypy": len(refused.intersection(names[module])),
            "run": len(of_mutants),
            **dict(sorted(Counter(of_mutants.values()).items())),
            "survivors": {
                mutant: {"difference": lines, "argument": arguments.get(lines, "")}
                for mutant, lines in differences.items()
            },
        }
    counts: Counter[str] = Counter()
    for entry in modules.values():
        counts.update({key: value for key, value in entry.items() if isinstance(value, int)})
    result = {"all": counts, "modules": modules}
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def commit() -> str:
    """Return the commit whose mutants these are."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def read_result() -> dict[str, Any]:
    """Return what the result file says, by module."""
    modules: dict[str, Any] = json.loads(RESULT.read_text())["modules"] if RESULT.exists() else {}
    return modules


def read_arguments() -> dict[str, str]:
    """Return what the result file says of survivors, by their difference."""
    survivors = [s for entry in read_result().values() for s in entry["survivors"].values()]
    return {s["difference"]: s["argument"] for s in survivors if s["argument"]}


def settled(outcomes: dict[str, str], module: str) -> dict[str, str]:
    """Return the outcomes that need not be found again: of what died, or has an argument."""
    arguments = read_arguments()
    return {
        mutant: outcome
        for mutant, outcome in outcomes.items()
        if outcome in (KILLED, ENDLESS) or difference(mutant, module) in arguments
    }


def main() -> None:
    """Run mutants of all modules in turns until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--longest", type=float, default=SLOW_S, help="seconds that a test may take"
    )
    parser.add_argument("--most", type=int, default=10**6, help="mutants of a module, at most")
    parser.add_argument("modules", nargs="*", help="such as speculation/policy; default: all")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT / "mutants"))
    names, arguments = write_mutants(), read_arguments()
    refused = find_refused(ROOT / "mutants")
    importlib.invalidate_caches()  # mutants/ may be new
    for preloaded in ("torch", "transformers", "hypothesis", "scipy.stats"):
        importlib.import_module(preloaded)
    before = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    outcomes = {m: found for m, found in before.items() if found["source"] == source_hash(m)}
    modules = options.modules or list(TESTS)
    for names_of_files, group in groupby(modules, TESTS.__getitem__):
        together = list(group)
        share = (deadline - time.monotonic()) * len(together) / len(modules)
        modules = modules[len(together) :]
        for module in together:
            of = settled(outcomes[module]["of"] if module in outcomes else {}, module)
            outcomes[module] = {"source": source_hash(module), "of": of}
        left = [(m, n) for m in together for n in names[m][: options.most]]
        left = [(m, n) for m, n in left if n not in outcomes[m]["of"] and n not in refused]
        mix(together)
        files, end = (
            [File(name, options.longest) for name in names_of_files],
            time.monotonic() + share,
        )
        left.sort(key=lambda pair: digest(pair[1]))
        try:
            for count, (module, name) in enumerate(left, 1):
                if time.monotonic() > end:
                    break
                outcomes[module]["of"][name] = search(files, name)
                if count % RECORDED == 0:
                    record(outcomes, names, refused, arguments)
                    print(f"{names_of_files[0]}: {count} of {len(left)}", flush=True)
        finally:  # a search that is stopped keeps what it has
            record(outcomes, names, refused, arguments)
        for file in files:
            file.end()


if __name__ == "__main__":
    main()
