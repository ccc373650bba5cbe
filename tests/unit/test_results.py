"""The page of results: its tables are what the files say, and no file lies there unused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_tables_are_what_the_result_files_say() -> None:
    command = [sys.executable, str(ROOT / "tools" / "results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_names_every_result_file_or_its_directory() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    files = [file for file in (DOCS / "results").rglob("*") if file.is_file()]
    unused = [f for f in files if f.name not in text and f"(results/{f.parent.name})" not in text]
    assert [str(file.relative_to(DOCS)) for file in unused if file.suffix != ".md"] == []
