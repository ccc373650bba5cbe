"""ppsd: exact, low-latency LLM decoding over several devices (PPSD, arXiv 2509.19368)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppsd.engine.async_llm import AsyncLLM
    from ppsd.engine.llm import LLM, Chunk, Completion
    from ppsd.types import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "Chunk", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import only what is asked for: PyTorch takes seconds, and `python -m ppsd` has not yet
    taken the working directory off the path.
    """
    if name == "SamplingParams":
        from ppsd.types import SamplingParams

        return SamplingParams
    if name == "AsyncLLM":
        from ppsd.engine.async_llm import AsyncLLM

        return AsyncLLM
    if name in ("LLM", "Chunk", "Completion"):
        from ppsd.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'ppsd' has no attribute {name!r}")
