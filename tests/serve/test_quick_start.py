"""The quick start of docs/serve.md, as it stands there but for the address."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def block(language: str, word: str) -> str:
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    [found] = [text for text in blocks if word in text]
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server) -> None:
    command = block("console", "curl").replace("localhost:8000", server.url).removeprefix("$ ")
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("data: ")
    assert run.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.skipif(find_spec("openai") is None, reason="the extra `clients` is not installed")
def test_python(server) -> None:
    with redirect_stdout(StringIO()) as out:
        exec(block("python", "import OpenAI").replace("http://localhost:8000", server.url), {})
    assert out.getvalue()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_parses(tmp_path) -> None:
    file = tmp_path / "quick.mjs"
    file.write_text(block("js", "new OpenAI"))
    subprocess.run(["node", "--check", file], check=True)
