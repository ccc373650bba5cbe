"""``ppsd-lab report``: result files as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="--json outputs of efficiency, predict, tasks and other verbs, and of acceptance."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the page and its plots.")],
    trace: Annotated[
        list[Path] | None, typer.Option(help="Trace of generate --trace; may be repeated.")
    ] = None,
) -> None:
    """Turn result files into one Markdown page with plots."""
    from ppsd.lab.report import read_result, write_report

    page = write_report([read_result(path) for path in results], trace or [], out)
    print(page)
