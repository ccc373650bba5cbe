"""``ppsd-lab efficiency``: the pipeline against theory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.lab.cli.memory import Memory, check_memory
from ppsd.lab.cli.oracle import (
    SET_HERE,
    BenchOptions,
    Rates,
    check_stages,
    label_of,
    measured,
    number,
    quartiles,
    rates_of,
    record_of,
    share,
    table_console,
)

if TYPE_CHECKING:
    from ppsd.lab import efficiency as study


def efficiency(
    config: Annotated[EngineConfig, Without((*SET_HERE, "block"))],
    options: BenchOptions,
    memory: Memory = "any",
    alphas: Rates = None,
) -> None:
    """Compare PPSD's speedup over plain decoding with theory, and say where the rest goes."""
    from ppsd.lab import efficiency as study
    from ppsd.lab.memory import label as memory_label
    from ppsd.lab.memory import with_memory

    check_stages(config)
    check_memory(memory)
    variants = study.variants(rates_of(alphas, study.ALPHAS), config.in_flight)
    with measured("efficiency", config, options, variants, block=1) as (llm, everything):
        results = with_memory(everything, memory)
        fast = [v for v in variants if v.alpha is not None]
        rows = study.summarize(results, [v.name for v in fast if not v.gate])
        gated = study.gated_speedups(results, [v.name for v in fast if v.gate])
        plain = study.plain_summary(results)
        found = memory_label(everything, memory)
        label = label_of(llm, results) + (f" · {found}" if found else "")
        if options.as_json:
            speedups = {name: asdict(speedup) for name, speedup in gated.items()}
            record = {"label": label, "memory": memory, "kept": len(results), "plain": plain}
            record |= {"rows": [asdict(row) for row in rows], "gated": speedups}
            print(json.dumps(record_of(llm, results) | record, indent=1))
        else:
            _show(label, plain, rows)
            for name, speedup in gated.items():
                print(f"{name}: {number(speedup.median)} × plain ({quartiles(speedup)})")


def _show(label: str, plain: dict[str, Any], rows: Sequence[study.Row]) -> None:
    console = table_console()
    console.print(label, soft_wrap=True)
    stages = " + ".join(f"{stage['median'] * 1e3:.2f}" for stage in plain["stage_times"])
    console.print(f"plain: {plain['token_time']['median'] * 1e3:.2f} ms a token; stages {stages}")
    if not rows:
        return  # all that counts was gated
    heads = ("α", "speedup", "quartiles", "ρ*", "of ρ*", "bound", "of bound")
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        speedup = (number(row.speedup.median), quartiles(row.speedup))
        paper = (number(row.paper.median), share(row.of_paper))
        model = (number(row.model.median), share(row.of_model))
        table.add_row(number(row.alpha.median), *speedup, *paper, *model)
    console.print(table)
    console.print("\nms a token: measured = ideal + losses (means)")
    parts = list(rows[0].budget)
    losses = Table("α", "measured", *parts, box=None, pad_edge=False)
    for row in rows:
        times = [row.token_time, *row.budget.values()]
        losses.add_row(number(row.alpha.median), *(f"{time * 1e3:.2f}" for time in times))
    console.print(losses)
