"""``ppsd-lab load``: many requests at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.display import pace_label
from ppsd.cli.flags import integers
from ppsd.cli.session import open_llm
from ppsd.config import MAX_CONCURRENT
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.cli.oracle import benchmark, check_out
from ppsd.lab.cli.prompts import Pipeline, Virtual, clocks

if TYPE_CHECKING:
    from ppsd.lab.load import Load


def load(
    config: Pipeline,
    prompts: Annotated[list[Path], benchmark("JSONL or text file of prompts; may be repeated.")],
    limit: Annotated[int | None, benchmark("Take so many prompts of each file, evenly.")] = None,
    max_tokens: Annotated[int, benchmark("Tokens of an answer.", "-n", "--max-tokens")] = 64,
    concurrent: Annotated[
        str, benchmark("Requests under way at once, one count after another.", metavar="N,…")
    ] = "1,8",
    out: Annotated[Path | None, benchmark("Write the JSON object here, too.")] = None,
    virtual: Virtual = False,
    as_json: Annotated[bool, benchmark("Print one JSON object.", "--json")] = False,
) -> None:
    """Compare PPSD with plain continuous batching while many requests are under way."""
    counts = integers("concurrent", concurrent)
    if not counts or not all(1 <= count <= MAX_CONCURRENT for count in counts):
        raise ConfigError("concurrent", concurrent, f"counts in [1, {MAX_CONCURRENT}]")
    check_out(out)
    from ppsd.measure.workload import load_tasks

    tasks = [task for path in prompts for task in load_tasks(path, limit)]
    from ppsd.lab.load import measure
    from ppsd.provenance import provenance
    from ppsd.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens)
    with open_llm(config.replaced(mode="ppsd", concurrent=max(counts)), **clocks(virtual)) as llm:
        ids = [llm.encode(task.messages) for task in tasks]
        with progress.bar("measuring", 2 * len(counts), "") as (bar, task):
            rows = list(
                measure(llm, ids, params, counts, lambda found: bar.update(task, advance=1))
            )
        record = {
            "stages": llm.layout.stages,
            "bounds": llm.layout.bounds,
            "rows": [asdict(row) for row in rows],
            "provenance": provenance(llm.config),
        }
        label = pace_label(llm.config)
    text = json.dumps(record, indent=1)
    if as_json:
        print(text)
    else:
        _show(rows, label)
    if out is not None:
        try:
            out.write_text(text + "\n")
        except OSError as error:
            raise PpsdError(f"cannot write {out}: {error.strerror}") from error


def _show(rows: Sequence[Load], label: str) -> None:
    heads = "at once", "variant", "tokens/s", "ratio", "all under way", "hits", "rows", "differing"
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        full = "" if row.full_ratio is None else f"{row.full_ratio:.2f}"
        cells = str(row.concurrent), row.variant, f"{row.speed:.1f}", f"{row.ratio:.2f}", full
        table.add_row(*cells, f"{row.hits:.0%}", f"{row.rows:.1f}", str(row.differing))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if label:
        console.print(label.strip())
