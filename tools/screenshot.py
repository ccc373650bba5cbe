"""Take the picture of the live page in docs/images, of a server that runs.

    ppsd serve --stages 4 --rows 4 --pace 0.04 --mode ppsd
    python tools/screenshot.py http://127.0.0.1:8000

Needs the extras `lab` and `page`, and Debian's chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "page.png"
READY = """document.querySelectorAll(".right").length > 30
  && [...nodes.values()].filter((node) => node.kind === "flying").length > 9"""
QUESTION = "Explain in simple words why the sky is blue."


def main(url: str) -> None:
    """Ask a question and take the picture in the middle of the answer."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(url)
        page.fill("#prompt", QUESTION)
        page.press("#prompt", "Enter")
        while not page.evaluate(READY):
            page.wait_for_timeout(20)
        page.screenshot(path=PICTURE)
        browser.close()
    small = Image.open(PICTURE).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    small.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
