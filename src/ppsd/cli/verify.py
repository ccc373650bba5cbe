"""``ppsd verify``: measure on this machine whether a mode says exactly what plain decoding says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ppsd.cli.display import notice
from ppsd.cli.session import advise, open_llm
from ppsd.cli.settings import Otherwise, Sampling
from ppsd.config import EngineConfig

if TYPE_CHECKING:
    from ppsd.engine.llm import LLM
    from ppsd.measure.verify import Comparison, Verification

# A plan of plain decoding would leave nothing to compare, and what is decoded in a gate's pauses
# would be compared with itself.
DEFAULTS = Otherwise({"mode": "ppsd", "gate": False})


def verify(
    config: Annotated[EngineConfig, DEFAULTS],
    sampling: Sampling,
    prompts: Annotated[
        Path, typer.Argument(help="JSONL or text file of prompts.", metavar="PROMPTS")
    ],
    limit: Annotated[
        int | None, typer.Option(help="Number of prompts to take, evenly from the file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Decode prompts plainly and in --mode; exit with 1 unless all tokens are equal."""
    from ppsd.measure.workload import load_tasks
    from ppsd.provenance import provenance

    tasks = load_tasks(prompts, limit)
    sampling.params()  # refuses now what would only fail once the model is loaded
    from ppsd.measure import verify as measurement  # imports PyTorch: not before the file is read

    console = Console(highlight=False, markup=False, soft_wrap=True, stderr=as_json)

    def done(comparison: Comparison) -> None:
        console.print(_line(comparison))

    with open_llm(config) as llm:
        params = sampling.params(llm.defaults.values)
        result = measurement.verify(llm, tasks, params, done)
    if as_json:
        print(json.dumps(result.to_json() | {"provenance": provenance(llm.config)}, indent=1))
    else:
        _conclude(console, result, llm, sampled=not params.greedy)
    if llm.config.schedule.drafts and not result.judged:
        notice(f"no draft was judged, so this says nothing of mode {llm.config.mode}", "yellow")
    advise(config, llm)
    if not result.passed:
        raise typer.Exit(1)


def _line(c: Comparison) -> str:
    rate = f"acceptance {c.accepted / c.judged:.0%}" if c.judged else "nothing judged"
    if c.divergence is None:
        bits = "logits bitwise equal" if c.bitwise else "logits differ in rounding"
        return f"{c.id}: {c.tokens} tokens equal, {bits}, smallest margin {c.margin:.3g}, {rate}"
    gap = "" if c.decided_by is None else f", plain logits apart by {c.decided_by:.3g}"
    return f"{c.id}: DIFFERS at token {c.divergence}{gap}, {rate}"


def _checked(llm: LLM) -> str:
    """Return in words what was compared with plain decoding."""
    config = llm.config
    at_once = f"{config.concurrent} requests at once" if config.concurrent > 1 else "One at a time"
    schedule = config.schedule
    if not schedule.drafts:
        return f"{at_once}, without drafts"
    if schedule.block > 1 or config.most_rows == 1:
        drafts = f"{config.mode}, m={schedule.block}, w={schedule.in_flight}"
    else:
        drafts = f"{config.most_rows} rows of candidate trees in a wave"
    heads = 1 + sum(head is not None for head in llm.layout.inner) if config.inner_heads else 1
    return f"{at_once}, {drafts}" + (f", {heads} heads" if heads > 1 else "")


def _conclude(console: Console, result: Verification, llm: LLM, *, sampled: bool) -> None:
    config, count = llm.config, len(result.comparisons)
    furthest = max(c.max_logit_difference for c in result.comparisons)
    console.print(f"\n{_checked(llm)}, each against the same prompt alone, decoded plainly")
    console.print(
        f"{result.exact} of {count} prompts exactly equal, {result.bitwise} with bitwise equal "
        f"logits; largest logit difference {furthest:.3g}; "
        f"kernels {', '.join(dict.fromkeys(llm.layout.kernels))}"
    )
    if config.schedule.drafts:
        console.print(f"{result.judged} drafts judged, {result.accepted} of them accepted")
    if not result.passed and sampled and config.acceptance == "rejection":
        console.print("rejection keeps the distribution of samples, not the samples themselves")
    elif not result.passed and config.schedule.block > 1:
        console.print("blocks of several tokens use other kernels than one token: see the margins")
    console.print("PASS" if result.passed else "FAIL", style="green" if result.passed else "red")
