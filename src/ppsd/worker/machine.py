"""What a process or thread takes of its machine: memory, cores, threads of PyTorch."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import psutil
import torch


def memory_used(pid: int | None = None) -> int:
    """Return the bytes of memory a process, or else this one, uses now; 0 for one that is gone.

    A page that several processes map, such as one of a library or of the model's file, counts in
    equal parts, so that the sum over processes is right. Where the system does not tell that
    share, pages of files are left out.
    """
    try:
        used = psutil.Process(pid).memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(used, "pss", 0) or used.uss)


def pin(cores: Sequence[int]) -> None:
    """Keep the calling thread, and those it starts, on ``cores``; nothing where unsupported."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


_setting_threads = threading.Lock()


def set_own_threads(count: int) -> None:
    """Let PyTorch use ``count`` CPU threads for what this thread computes, and for nothing else.

    Setting the count also sets what threads to come begin with. A thread that ends at once puts
    that back.
    """
    with _setting_threads:
        before = torch.get_num_threads()  # the process's, unless this thread has set its own
        torch.set_num_threads(count)
        other = threading.Thread(target=torch.set_num_threads, args=(before,))
        other.start()
        other.join()
