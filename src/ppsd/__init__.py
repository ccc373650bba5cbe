"""ppsd: exact, low-latency LLM decoding over several devices (PPSD, arXiv 2509.19368)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppsd.types import SamplingParams

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM, Chunk, Completion

__version__ = "0.1.0"
__all__ = ["LLM", "Chunk", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch only when it is asked for."""
    if name in ("LLM", "Chunk", "Completion"):
        from ppsd.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'ppsd' has no attribute {name!r}")
