"""The house rules a machine can check: which way imports go, and how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

SRC = Path(__file__).parents[2] / "src"
MAX_FUNCTION, MAX_FILE, MEDIAN_FUNCTION = 60, 400, 10
ANYONE = {"errors", "checks", "settings", "types", "provenance"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "checks": {"errors"},
    "settings": set(),
    "types": {"errors"},
    "plots": {"errors"},
    "config": {"speculation"},
    "provenance": {"config", "model"},
    "model": {"speculation"},
    "speculation": set(),
    "transport": set(),
    "worker": {"transport", "model", "speculation"},
    "engine": {"config", "plan", "worker", "transport", "model", "speculation"},
    "plan": {"model", "speculation"},
    "train": {"plots", "model", "speculation"},
    "measure": {
        "plots",
        "config",
        "engine",
        "plan",
        "model",
        "speculation",
        "train",
    },
    "serve": {"engine", "model"},
    "cli": {
        "plots",
        "config",
        "serve",
        "engine",
        "measure",
        "worker",
        "plan",
        "speculation",
        "model",
        "train",
    },
    "lab": {
        "plots",
        "config",
        "cli",
        "engine",
        "measure",
        "transport",
        "worker",
        "plan",
        "speculation",
        "model",
        "train",
    },
    "__main__": {"cli"},
    "__init__": {"engine"},
}

PLAIN_ENGLISH = {"model", "train"}
RIDDLES = {"See", "What", "Whether", "Where", "Which", "Those", "How", "Everything", "As", "No"}
NO_VERBS = {  # beside those that their form gives away, or an "of" behind them
    *RIDDLES, "After", "All", "Among", "An", "At", "By", "Contention", "Each", "Epoch", "Every",
    "First", "For", "If", "In", "Last", "Latency", "Least", "Length", "Mean", "Median", "Most",
    "Named", "Nothing", "Number", "Of", "On", "One", "Our", "Plain", "Provenance", "Short",
    "Speedup", "Standard", "That", "The", "Token", "True", "When", "Why",
}  # fmt: skip
BEFORE_OF = {"Hear", "Keep", "Speak", "Tell"}  # verbs, as in "Tell of a chain's rows"


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SRC.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def part(name: str) -> str:
    """The layer of a dotted module name inside ppsd."""
    return name.split(".")[1] if "." in name else "__init__"


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ppsd"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            if node.module != "ppsd":
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("ppsd."))


def test_imports_go_one_way() -> None:
    wrong = []
    for path, tree in modules():
        layer = part(".".join(path.relative_to(SRC).with_suffix("").parts))
        allowed = MAY_IMPORT[layer] | ANYONE | {layer}
        wrong += [f"{path.name}: {name}" for name in imported(tree) if part(name) not in allowed]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    """Imports within functions count, too: they hide a circle, they do not break it."""
    names = {
        ".".join(path.relative_to(SRC).with_suffix("").parts): tree for path, tree in modules()
    }
    imports = {name: {n for n in imported(tree) if n in names} for name, tree in names.items()}
    list(TopologicalSorter(imports).static_order())  # raises CycleError


def functions() -> Iterator[tuple[str, int]]:
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{path.name}:{node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    lengths = dict(functions())
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == {}
    assert median(lengths.values()) < MEDIAN_FUNCTION


def test_files_are_short() -> None:
    everything = [*SRC.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]
    lengths = {str(path): len(path.read_text().splitlines()) for path in everything}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE} == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [p.name for p, tree in modules() if not ast.get_docstring(tree)] == []


def test_docstrings_are_no_riddles() -> None:
    """Those of modules and classes name the noun, in the rooms that have been gone through."""
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree) if path.parent.name in PLAIN_ENGLISH else ():
            if isinstance(node, ast.Module | ast.ClassDef):
                first = (ast.get_docstring(node) or "Do").split()[0].rstrip(".,:;")
                if first in RIDDLES:
                    wrong.append(f"{path.name}: {ast.get_docstring(node)}")
    assert wrong == []


def begins_with_a_verb(docstring: str) -> bool:
    """Tell if a docstring seems to begin with an imperative.

    A plural, a participle, a name or a formula is none, nor is a noun with its "of". Some nouns
    get by, such as those of "Process ids" and "Log weights".
    """
    first, second = [*docstring.split(), ""][:2]
    first = first.rstrip(".,:;")
    if not re.fullmatch("[A-Z][a-z]+", first) or first in NO_VERBS:
        return False
    if re.search("[^s]s$|.{4}(?<!e)ed$|.{3}ing$", first):  # but Pass, Exceed, Embed, Bring
        return False
    return second != "of" or first in BEFORE_OF


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    wrong = []
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                told = ast.get_docstring(node)
                if told is not None and not begins_with_a_verb(told):
                    wrong.append(f"{path.relative_to(SRC)}:{node.name}: {told.splitlines()[0]}")
    assert wrong == []


def test_no_pickle_anywhere() -> None:
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & banned, path
        assert "_object_list" not in path.read_text(), f"{path}: pickles under the hood"


def test_the_policy_and_the_command_line_do_not_import_torch() -> None:
    """The policy is pure, and --help has to be instant."""
    pure = ("speculation.policy", "cli.app", "lab.cli.app", "config", "plan.planner")
    for module in (f"ppsd.{name}" for name in pure):
        code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, module
