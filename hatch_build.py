"""Compile kernels.c into the wheel, also an editable one, where there is a C compiler.

Without one, or where it fails, the wheel is made all the same: kernels are then compiled by the
machine that runs them, and PyTorch stands in where that has no compiler either.
"""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).parent / "src"


def _system() -> str:
    """Name the systems that can load what is compiled here: with this C library or a newer one.

    An index takes no wheel for "linux". OpenMP's library, which is in no such name, comes with
    PyTorch.
    """
    library, version = platform.libc_ver()
    if library != "glibc":
        return sysconfig.get_platform().replace("-", "_")
    major, minor = version.split(".")[:2]
    return f"manylinux_{major}_{minor}_{platform.machine()}"


class KernelHook(BuildHookInterface):
    """Leave a library for each target beside kernels.c, and name the platform in the wheel's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; hatchling calls this before it collects files."""
        sys.path.insert(0, str(SOURCES))
        from ppsd.errors import PpsdError
        from ppsd.model import kernel_build

        kept = {kernel_build.shipped_file(target) for target in kernel_build.TARGETS}
        for library in kernel_build.HERE.glob("kernels-*.so"):
            if version != "editable" or library not in kept:  # pip makes an editable wheel twice
                library.unlink()
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        for target in kernel_build.TARGETS:
            if kernel_build.shipped_file(target).exists():
                continue
            try:
                command = kernel_build.compiler()
                if not shutil.which(command[0]):
                    return
                made = kernel_build.compile_kernels(command, target)
            except PpsdError as error:
                made = str(error)
            if isinstance(made, bytes):
                kernel_build.shipped_file(target).write_bytes(made)
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{_system()}"
            else:
                self.app.display_warning(f"no {target.name} kernels in the wheel: {made}")
