"""``ppsd-lab tasks``: real prompts and trained heads."""

from __future__ import annotations

from typing import Annotated

from ppsd.cli.flags import integers
from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError
from ppsd.lab.cli.oracle import benchmark
from ppsd.lab.cli.prompts import (
    GREEDY,
    SAMPLED,
    Virtual,
    WorkOptions,
    groups_of,
    measured,
    planned_pipeline,
    show,
)

EVERY = "1,2,3,4,5,6,7,8"


def tasks(
    config: Annotated[EngineConfig, Without(("mode", "block", "in_flight", "rows", "concurrent"))],
    work: WorkOptions,
    gammas: Annotated[str, benchmark("Draft lengths of draft-then-verify.", metavar="γ,…")] = EVERY,
    rows: Annotated[
        str | None, benchmark("Rows of waves: PPSD with each of these.", metavar="R,…")
    ] = None,
    names: Annotated[
        str | None,
        benchmark(
            "Compare these: plain, ppsd, draft-then-verify, del, del-heads, knn-ssd.",
            "--variants",
            metavar="NAME,…",
        ),
    ] = None,
    sampled: Annotated[bool, benchmark("Also decode at temperature 1.", "--sampled")] = False,
    virtual: Virtual = False,
) -> None:
    """Compare plain decoding, PPSD and its rivals on real prompts with trained heads."""
    several = integers("rows", rows) if rows else ()
    verb = "tasks --virtual" if virtual else "tasks"
    lengths = () if rows and gammas == EVERY else integers("gammas", gammas)
    tasks = work.tasks()
    from ppsd.lab.tasks import RIVAL, TaskBench, named, variants
    from ppsd.types import SamplingParams

    if names is None:
        chosen = variants(lengths, several)
    else:
        chosen = named(names.split(","), integers("gammas", gammas), several)
    params = {GREEDY: SamplingParams(max_tokens=work.max_tokens)}
    if sampled and any(variant.mode == RIVAL for variant in chosen):
        raise ConfigError("sampled", True, "left out with rivals, which decode greedily")
    if sampled:
        params[SAMPLED] = SamplingParams(1.0, max_tokens=work.max_tokens)
    with planned_pipeline(config, chosen, virtual=virtual) as llm:
        bench = TaskBench(llm, chosen, tasks, params)
        every = [v.name for v in chosen]
        results = measured(verb, llm, work, every, tasks, list(params), bench.measure)
        show(llm, work, results, groups_of(tasks, list(params)))
