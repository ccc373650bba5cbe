"""``ppsd-lab paper``: what the paper's formula and settings imply, as a report; no model is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def paper(
    out: Annotated[Path, typer.Option(help="Directory for report.md, tables and plots.")],
    tokens: Annotated[int, typer.Option(min=10, help="Tokens of every simulated run.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Decides which simulated drafts are right.")] = 0,
) -> None:
    """Write a report of the paper's settings: needed acceptance, break-even, exit layer, links."""
    from ppsd.lab.paper import write_report

    print(write_report(out, tokens, seed))
