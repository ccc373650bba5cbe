"""``ppsd-lab endurance``: does a long request slow down, do many requests eat memory?"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab.cli.oracle import (
    SET_HERE,
    BenchOptions,
    benchmark,
    check_stages,
    measured,
    record_of,
    table_console,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ppsd.lab.endurance import Drift, Memory


OWN = (*SET_HERE, "block", "in_flight", "pace")


def endurance(
    config: Annotated[EngineConfig, Without(OWN)],
    options: BenchOptions,
    requests: Annotated[int, benchmark("Short requests whose memory is watched.")] = 100,
) -> None:
    """Compare the last tokens of a long request with the first, and memory over many requests."""
    check_stages(config)
    from ppsd.lab import endurance as study

    study.check(requests)
    study.check_tokens(options.tokens)
    profile = _profile(config)
    with measured("endurance", config, options, study.VARIANTS, block=1) as (llm, results):
        prompts = [llm.encode(task.messages) for task in options.tasks()]
        length = sum(map(len, prompts)) // len(prompts)
        ratios = study.explained(
            profile, llm.layout.bounds, study.schedules(llm), length,
            options.tokens,
        )  # fmt: skip
        rows = study.drifts(results, ratios)
        with progress.bar("requests", requests, "") as (bar, task):
            memory = study.memory(
                llm, prompts[0], requests, lambda n: bar.update(task, completed=n)
            )
        if options.as_json:
            print(json.dumps(record_of(llm, results) | _findings(rows, memory), indent=1))
        else:
            _show(rows, memory)


def _profile(config: EngineConfig) -> Any:
    from ppsd.engine.choose import outlook

    profile = outlook(config).profile
    if not profile.measured:
        allowed = "a file of `ppsd profile`, or auto once that has been run here"
        raise ConfigError("plan", config.plan, allowed)
    return profile


def _findings(rows: Sequence[Drift], memory: Memory) -> dict[str, Any]:
    drift = [dataclasses.asdict(row) | {"beyond": row.beyond} for row in rows]
    return {"drift": drift, "memory": {"resident": memory.resident, "growth": memory.growth}}


def _show(rows: Sequence[Drift], memory: Memory) -> None:
    console = table_console()
    table = Table("mode", "first ms", "last ms", "ratio", "by context", "beyond", box=None)
    for row in rows:
        times = [f"{each.median * 1e3:.2f}" for each in (row.first, row.last)]
        ratios = [f"{row.ratio.median:.3f}", f"{row.explained:.3f}", f"{row.beyond:+.1%}"]
        table.add_row(row.variant, *times, *ratios)
    console.print(table)
    grown = ", ".join(f"stage {i} {bytes_ / 2**20:+.1f}" for i, bytes_ in enumerate(memory.growth))
    console.print(f"memory over {len(memory.resident)} requests: {grown} MiB")
