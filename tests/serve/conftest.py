"""A server of a tiny model, three requests at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ppsd import LLM
from tests.support.http_server import Served, serving
from tests.support.tiny_models import save_perfect_head

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
SETTINGS = {
    "split": (4,),
    "dtype": "float64",
    "prefill_chunk": 8,
    "transport": "inprocess",
    "threads_per_stage": 1,
    "chat_template": TEMPLATE,
}


@pytest.fixture(scope="package")
def head(tiny_model, tmp_path_factory) -> str:
    """Give the directory of a head that is right often, not always."""
    return str(save_perfect_head(tmp_path_factory.mktemp("head"), tiny_model(), 4, 0.3))


@pytest.fixture(scope="package")
def llm(tiny_model, head) -> Iterator[LLM]:
    settings = SETTINGS | {"rows": 2, "concurrent": 3, "mode": "ppsd", "head": head}
    with LLM(str(tiny_model()), gate=False, **settings) as llm:  # drafts for tests to count
        yield llm


@pytest.fixture(scope="package")
def plain(tiny_model) -> Iterator[LLM]:
    """Plain decoding of one request at a time, as the reference."""
    with LLM(str(tiny_model()), mode="autoregressive", **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="package")
def server(llm) -> Iterator[Served]:
    with serving(llm, served_model_name=("tiny", "alias"), max_queue=61) as served:
        yield served
