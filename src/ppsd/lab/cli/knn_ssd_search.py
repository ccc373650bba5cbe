"""``ppsd-lab knn-ssd-search``: KNN-SSD's offline search for a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ppsd.cli import progress
from ppsd.cli.session import open_llm
from ppsd.cli.settings import Without
from ppsd.config import EngineConfig
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.cli.oracle import benchmark

if TYPE_CHECKING:
    from ppsd.measure.workload import Task

# One stage without drafts of ours.
SET_HERE = (
    "stages", "split", "exit_layer", "mode", "block", "in_flight", "rows", "concurrent", "head",
    "heads", "force_head", "lookup", "gate", "acceptance", "pace", "plan",
    "devices", "transport", "prefill_chunk", "escape_special", "timeout", "init_timeout",
)  # fmt: skip


def knn_ssd_search(
    config: Annotated[EngineConfig, Without(SET_HERE)],
    prompts: Annotated[list[Path], benchmark("JSONL file of prompts with a category each.")],
    limit: Annotated[int | None, benchmark("Take so many prompts of each file, evenly.")] = None,
    evaluations: Annotated[int, benchmark("Skip sets to try for each task.", min=1)] = 1000,
    samples: Annotated[int, benchmark("Prompts of an evaluation.", min=1)] = 8,
    max_tokens: Annotated[int, benchmark("Tokens of an answer.", "-n", "--max-tokens", min=2)] = 32,
    centres: Annotated[int, benchmark("Centres of a task's prompts.", min=1)] = 10,
    out: Annotated[
        Path | None, benchmark("Write the result here, not where `tasks` looks for it.")
    ] = None,
    as_json: Annotated[bool, benchmark("Print one JSON object.", "--json")] = False,
) -> None:
    """Find the sub-layers that KNN-SSD's drafts leave out, for every task; goes on if stopped."""
    from ppsd.measure.workload import digest, load_tasks

    tasks = [task for path in prompts for task in load_tasks(path, limit)]
    from ppsd.lab.rivals.search import Budget, Trials, by_task, search
    from ppsd.lab.rivals.skips import place_of
    from ppsd.provenance import provenance

    _check(tasks, samples)
    budget = Budget(evaluations, samples, max_tokens, centres)
    alone = config.replaced(stages=1, mode="autoregressive", head="none")
    with open_llm(alone) as llm:
        place = out or place_of(llm.layout.identity.fingerprint)
        place.parent.mkdir(parents=True, exist_ok=True)
        about = {"budget": vars(budget), "tasks": [task.id for task in tasks]}
        about |= {"asked": digest(tasks)}
        part = place.with_name(place.name + ".part")
        trials = Trials(part, about | {"fingerprint": llm.layout.identity.fingerprint})
        with progress.bar(
            "searching", evaluations * len(by_task(tasks)), "{task.fields[note]}"
        ) as (
            bar,
            task,
        ):
            known = sum(map(len, trials.found.values()))
            bar.update(task, advance=known, note="")
            found = search(
                llm, tasks, budget, trials, lambda note: bar.update(task, advance=1, note=note)
            )
        record = found.to_json() | {"provenance": provenance(llm.config)}
    text = json.dumps(record)
    try:
        place.write_text(text + "\n")
        part.unlink(missing_ok=True)
    except OSError as error:
        raise PpsdError(f"cannot write {place}: {error.strerror}") from error
    print(text if as_json else place)


def _check(tasks: Sequence[Task], samples: int) -> None:
    """Raise ConfigError for a task with fewer prompts than an evaluation takes."""
    from ppsd.lab.rivals.search import by_task

    for task, own in by_task(tasks).items():
        if len(own) < samples:
            raise ConfigError("samples", samples, f"at most the prompts of {task}, {len(own)}")
