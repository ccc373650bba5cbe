"""What is compiled when a wheel is made: a library for each target, or none, and a wheel anyway."""

from __future__ import annotations

import platform
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ppsd.errors import KernelError
from ppsd.model import kernel_build

ROOT = Path(__file__).parents[2]
AVX512, AVX2 = kernel_build.TARGETS


class Hook:
    """The hook of hatch_build.py, for a package whose libraries lie in a directory of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, package: Path) -> None:
        interface = ModuleType("hatchling.builders.hooks.plugin.interface")
        interface.__dict__["BuildHookInterface"] = object  # hatchling is not installed for tests
        patch.setitem(sys.modules, interface.__name__, interface)
        patch.setattr(platform, "machine", lambda: "x86_64")
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "2.28"))
        patch.setattr(kernel_build, "HERE", package)
        patch.setattr(kernel_build, "compile_kernels", self._compile)
        patch.setenv("CC", sys.executable)  # which is there
        self.outcomes: dict[str, bytes | str | Exception] = {}
        self.compiled: list[str] = []
        self.told: list[str] = []
        self._package = package
        self._hook = runpy.run_path(str(ROOT / "hatch_build.py"))["KernelHook"]()
        self._hook.app = SimpleNamespace(display_warning=self.told.append)

    def _compile(self, command: list[str], machine: kernel_build.Target) -> bytes | str:
        self.compiled.append(machine.name)
        outcome = self.outcomes.get(machine.name, b"a library")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def build(self, version: str = "standard") -> tuple[set[Path], dict[str, Any]]:
        """Make a wheel; give the libraries in it and what hatchling is told."""
        about: dict[str, Any] = {}
        self.compiled.clear()
        self._hook.initialize(version, about)
        return set(self._package.glob("kernels-*.so")), about


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hook:
    (tmp_path / "kernels-avx2-of-old.so").touch()
    return Hook(monkeypatch, tmp_path)


def test_every_target_has_a_library_and_the_wheel_a_platform(hook: Hook) -> None:
    files, about = hook.build()
    assert files == {kernel_build.shipped_file(target) for target in (AVX512, AVX2)}
    assert about["pure_python"] is False
    assert about["tag"] == "py3-none-manylinux_2_28_x86_64"
    assert kernel_build.shipped(AVX2) == b"a library"
    assert hook.told == []


def test_other_c_libraries_have_the_name_of_this_platform(hook: Hook, monkeypatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # as musl's is told
    assert re.fullmatch(r"py3-none-linux_\w+", hook.build()[1]["tag"])


def test_pip_makes_an_editable_wheel_twice_and_compiles_once(hook: Hook) -> None:
    files, _ = hook.build("editable")
    assert hook.compiled == ["avx512_bf16", "avx2"]
    assert hook.build("editable")[0] == files
    assert hook.compiled == []
    hook.build("standard")
    assert hook.compiled == ["avx512_bf16", "avx2"]


def test_without_a_compiler_there_is_a_wheel(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert hook.build() == (set(), {})
    monkeypatch.setenv("CC", "cc 'half")
    assert hook.build() == (set(), {})


def test_what_a_compiler_refuses_is_told_and_left_out(hook: Hook) -> None:
    hook.outcomes = {"avx512_bf16": "cc refused it", "avx2": KernelError("cc was killed")}
    assert hook.build() == (set(), {})
    assert hook.told == [
        "no avx512_bf16 kernels in the wheel: cc refused it",
        "no avx2 kernels in the wheel: cc was killed",
    ]
    del hook.outcomes["avx2"]
    assert hook.build()[0] == {kernel_build.shipped_file(AVX2)}
