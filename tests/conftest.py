"""Shared fixtures: one thread, tiny models made once, and the embedded model where installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

from tests.support.tiny_models import save_tiny

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")
settings.register_profile(  # for mutants: that a test fails is enough to know
    "unshrunk", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate), database=None
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the directory of a tiny model by family name."""
    made: dict[str, Path] = {}

    def get(family: str = "llama") -> Path:
        if family not in made:
            made[family] = save_tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get
