"""The paper on paper: a report of what its formula and settings imply, without running a model.

Source of formula and settings: arXiv 2509.19368.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ppsd
from ppsd.lab import closed_forms
from ppsd.lab.pipelines import even_split, paper_split, predict, uniform
from ppsd.lab.plot import plot_gantt, plot_lines
from ppsd.lab.simulator import acceptance, simulate
from ppsd.lab.sweep import Row, Scenario, write_csv
from ppsd.plan import theory
from ppsd.plan.model import CostModel, Link
from ppsd.plan.presets import HARDWARE, find_hardware, find_shape
from ppsd.plots import require_matplotlib
from ppsd.speculation.policy import MODES, Schedule

N = 32  # Vicuna-7B, the paper's main model
EXITS = (4, 8, 16, 24)
CLAIMS = (2.01, 3.81)  # the range of speedups in the paper's abstract
DEPTHS = {"Vicuna-7B": 32, "Vicuna-13B, LLaMA-2-13B": 40, "LLaMA-2-70B": 80}
SHARES = (16, 10, 8, 4, 2)  # exit layers as N divided by these
BLOCKS = (2, 4, 6, 8)
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
MODEL, MACHINE = "vicuna-7b", "h100-nvlink"
FINE = np.linspace(0, 1, 101)
GANTT_TOKENS, GANTT_ALPHA, GANTT_SEED = 12, 0.8, 5


class Report:
    """Collects the text of ``report.md`` in ``out`` and writes tables and plots beside it."""

    def __init__(self, out: Path, tokens: int, seed: int) -> None:
        self.out = out
        self.tokens = tokens
        self.seed = seed
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        """Add a paragraph."""
        self.parts.append(text)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Add a table, also written as ``name``.csv."""
        write_csv(rows, self.out / f"{name}.csv")
        head = list(rows[0])
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in rows]
        self.say("\n".join(lines))
        self.say(f"Data: [{name}.csv]({name}.csv)")

    def plot(self, name: str, title: str, draw: Callable[[Path], None]) -> None:
        """Add a picture."""
        draw(self.out / f"{name}.png")
        self.say(f"![{title}]({name}.png)")

    def simulated_speedup(self, cost: CostModel, schedule: Schedule, alpha: float) -> float:
        """Return a simulated request's speedup over plain decoding."""
        run = simulate(cost, schedule, acceptance(alpha, self.tokens, self.seed))
        return round(cost.latency() / run.token_time, 3)


def write_report(out: Path, tokens: int, seed: int) -> Path:
    """Write report.md with its tables and plots into ``out``; returns its path."""
    require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, tokens, seed)
    report.say("# The paper on paper")
    report.say(_provenance(tokens, seed))
    for section in (_formula, _claims, _draft_then_verify, _two_workers, _exits, _links, _gantt):
        section(report)
    path = out / "report.md"
    path.write_text("\n\n".join(report.parts) + "\n")
    return path


def _formula(report: Report) -> None:
    report.say("## ρ* beside a model with head, LM head and hops")
    report.say(
        f"Eq. 7 counts layers only. The model uses predicted times of {MODEL} on {MACHINE} "
        "(bytes over memory bandwidth; see the presets for sources), N/E workers and an exit head "
        "with a vocabulary of 8192; *simulated* is the real policy on a virtual clock with the "
        "same times. Where E does not divide N the last stage is shorter, stages do not wait for "
        "a common tick, and the model may exceed ρ*, which rounds N/E up."
    )
    cases = [(e, alpha) for e in EXITS for alpha in (*ALPHAS, 1.0)]
    report.table("formula", [_formula_row(report, e, alpha) for e, alpha in cases])
    lines = {f"E = {e}": (list(FINE), list(theory.paper_speedup(FINE, N, e))) for e in EXITS} | {
        "limit 1/(1 − α)": (list(FINE[:84]), list(closed_forms.many_stages_limit(FINE[:84])))
    }
    draw = partial(plot_lines, lines, ("acceptance rate α", "ρ*"), f"Eq. 7, N = {N}")
    marks = {f"{claim}×": claim for claim in CLAIMS}
    report.plot("formula", "ρ* against α", lambda path: draw(path, marks=marks))


def _formula_row(report: Report, exit_layer: int, alpha: float) -> Row:
    cost = predict(find_shape(MODEL), find_hardware(MACHINE), paper_split(N, exit_layer))
    schedule = Schedule(1, cost.size)
    return {
        "E": exit_layer,
        "workers": cost.size,
        "α": alpha,
        "ρ*": round(float(theory.paper_speedup(alpha, N, exit_layer)), 3),
        "model": round(float(cost.speedup(alpha, schedule)), 3),
        "simulated": report.simulated_speedup(cost, schedule, alpha),
        "ρ* per worker": round(float(theory.paper_speedup(alpha, N, exit_layer)) / cost.size, 3),
    }


def _claims(report: Report) -> None:
    report.say("## Which α the claims need")
    report.say(
        "Eq. 7 solved for α. A dash: not even α = 1 gives that speedup, for N/E is below it."
    )
    rows: list[Row] = []
    for claim in CLAIMS:
        for e in EXITS:
            rows.append(_claim_row(claim, f"N = {N}", N, e))
        for name, layers in DEPTHS.items():
            exits = sorted({layers // share for share in SHARES})
            rows += [_claim_row(claim, name, layers, e) for e in exits]
    report.table("claims", rows)


def _claim_row(claim: float, model: str, layers: int, exit_layer: int) -> Row:
    alpha = float(closed_forms.paper_alpha(claim, layers, exit_layer))
    return {
        "speedup": claim,
        "model": model,
        "N": layers,
        "E": exit_layer,
        "workers": len(paper_split(layers, exit_layer)),
        "α needed": None if np.isnan(alpha) else round(alpha, 4),
    }


def _draft_then_verify(report: Report) -> None:
    report.say("## Where draft-then-verify turns slower than plain decoding")
    report.say(
        "A round of m rows runs layers [0, E) m times and the rest once, and commits "
        "(1 − α^m)/(1 − α) tokens (m − 1 drafts and the target's own). Below the break-even α it "
        "is slower than plain decoding. *bare*: layers only. *with head*: an exit head worth one "
        "layer, and each further row of a block costing 5 % of the first. A dash: always slower. "
        "By Eq. 7 PPSD breaks even at α = 0 where E divides N. At E = 24 Eq. 7 itself is below 1 "
        "for α < 2/3, because it rounds N/E up; stages that do not wait for a common tick are not."
    )
    cases = [(e, m) for e in EXITS for m in BLOCKS]
    report.table("break_even", [_break_even_row(e, m) for e, m in cases])
    speedup = closed_forms.draft_then_verify_speedup
    lines = {f"m = {m}, E = 8": (list(FINE), list(speedup(FINE, m, N, 8))) for m in BLOCKS}
    lines["ρ*, E = 8"] = (list(FINE), list(theory.paper_speedup(FINE, N, 8)))
    labels = ("acceptance rate α", "speedup over plain decoding")
    draw = partial(plot_lines, lines, labels, f"Draft-then-verify, N = {N}, layers only")
    report.plot("break_even", "speedup of draft-then-verify against α", draw)


def _break_even_row(exit_layer: int, block: int) -> Row:
    bare = float(closed_forms.break_even_alpha(block, N, exit_layer))
    real = float(closed_forms.break_even_alpha(block, N, exit_layer, head=1.0, row_cost=0.05))
    speedup = closed_forms.draft_then_verify_speedup(0.8, block, N, exit_layer)
    return {
        "E": exit_layer,
        "m": block,
        "break-even α, bare": None if np.isnan(bare) else round(bare, 4),
        "break-even α, with head": None if np.isnan(real) else round(real, 4),
        "speedup at α = 0.8, bare": round(float(speedup), 3),
        "ρ* at α = 0.8": round(float(theory.paper_speedup(0.8, N, exit_layer)), 3),
    }


def _two_workers(report: Report) -> None:
    report.say("## Two workers with E = 8")
    report.say(
        f"ρ* at E = 8 assumes {N // 8} workers. With two, stages of 8 and 24 layers, one token at "
        "a time is bound by the second worker (32/24 = 1.33). Blocks of m tokens, w = 2 in flight, "
        "let it verify several at once; layer times only, further rows of a block free."
    )
    cost = uniform((8, 24), 1e-3)
    schedules = [Schedule(m, 2) for m in (1, 2, 3, 4)]
    report.table(
        "two_workers", [_worker_row(report, cost, s, a) for s in schedules for a in ALPHAS]
    )


def _worker_row(report: Report, cost: CostModel, schedule: Schedule, alpha: float) -> Row:
    return {
        "m": schedule.block,
        "w": schedule.in_flight,
        "α": alpha,
        "model": round(float(cost.speedup(alpha, schedule)), 3),
        "simulated": report.simulated_speedup(cost, schedule, alpha),
        "ρ* (4 workers)": round(float(theory.paper_speedup(alpha, N, 8)), 3),
    }


def _exits(report: Report) -> None:
    report.say("## Which exit layer: the N/4 question")
    report.say(
        "At a fixed α, ρ* only grows as E shrinks, so a best E comes from what Eq. 7 leaves out. "
        f"Left: any number of workers, N/E of them, predicted times of {MODEL} on {MACHINE}. "
        "Right: four workers, the other three sharing the remaining layers evenly. A head's own α "
        "falls with E; how fast decides the rest, and only a trained head can tell."
    )
    report.table("exit", [_exit_row(alpha) for alpha in ALPHAS])
    exits = list(range(1, N // 2 + 1))
    lines = {f"α = {alpha}": (exits, _speeds_by_exit(exits, alpha)) for alpha in ALPHAS}
    labels = ("exit layer E, four workers", "speedup over plain decoding")
    draw = partial(plot_lines, lines, labels, f"Predicted: {MODEL} on {MACHINE}")
    report.plot("exit", "speedup against exit layer", draw)


def _speeds_by_exit(exits: Sequence[int], alpha: float) -> list[float]:
    build = partial(predict, find_shape(MODEL), find_hardware(MACHINE))
    return [float(build(even_split(N, 4, e)).speedup(alpha, Schedule(1, 4))) for e in exits]


def _exit_row(alpha: float) -> Row:
    build = partial(predict, find_shape(MODEL), find_hardware(MACHINE))
    free = {e: build(paper_split(N, e)) for e in range(1, N // 2 + 1)}
    four = {e: build(even_split(N, 4, e)) for e in range(1, N - 2)}
    best_free, speed_free = _best(free, alpha)
    best_four, speed_four = _best(four, alpha)
    return {
        "α": alpha,
        "best E, N/E workers": best_free,
        "workers": free[best_free].size,
        "speedup": speed_free,
        "speedup at E = N/4": round(float(free[N // 4].speedup(alpha, Schedule(1, 4))), 3),
        "best E, 4 workers": best_four,
        "speedup, 4 workers": speed_four,
    }


def _best(costs: dict[int, CostModel], alpha: float) -> tuple[int, float]:
    """Return the fastest exit layer (the deepest among equals) and its speedup."""
    speeds = {e: float(cost.speedup(alpha, Schedule(1, cost.size))) for e, cost in costs.items()}
    best = max(speeds, key=lambda e: (round(speeds[e], 6), e))
    return best, round(speeds[best], 3)


def _links(report: Report) -> None:
    report.say("## Where communication eats the gain")
    report.say(
        f"{MODEL}, E = 8, 4 workers, α = 0.8; predicted times. A hop costs plain pipeline decoding "
        "just as much, so the speedup over it hardly suffers; against one device that holds the "
        "whole model (last columns) the hops of a resync do count. w is the number of blocks in "
        "flight that fills the round trip."
    )
    report.table("links", [_link_row(report, hardware.name) for hardware in HARDWARE])


def _link_row(report: Report, name: str) -> Row:
    cost = predict(find_shape(MODEL), find_hardware(name), (8,) * 4)
    wide = Schedule(1, min(64, int(np.ceil(cost.latency() / cost.tick()))))
    single = predict(find_shape(MODEL), find_hardware(name), (N,)).latency()
    run = simulate(cost, wide, acceptance(0.8, report.tokens, report.seed))
    return {
        "hardware": name,
        "one device, ms/token": round(single * 1e3, 3),
        "plain pipeline, ms/token": round(cost.latency() * 1e3, 3),
        "w": wide.in_flight,
        "PPSD, ms/token": round(run.token_time * 1e3, 3),
        "over plain pipeline": round(cost.latency() / run.token_time, 3),
        "over one device": round(single / run.token_time, 3),
        "over plain pipeline, w = P": report.simulated_speedup(cost, Schedule(1, 4), 0.8),
    }


def _gantt(report: Report) -> None:
    report.say("## The same tokens in three schedules")
    report.say(
        f"{GANTT_TOKENS} tokens, four stages of 8 layers of 1 ms, a head of 1 ms, hops of 0.2 ms; "
        f"the same drafts are right in all three (α = {GANTT_ALPHA}, seed {GANTT_SEED})."
    )
    scenario = Scenario(_gantt_cost, N, 4, 8, ((0, GANTT_ALPHA),), GANTT_TOKENS, GANTT_SEED)
    runs = {mode: scenario.run(mode, scenario.cost(), trace=True) for mode in MODES}
    report.plot("gantt", "Gantt charts", partial(plot_gantt, runs))


def _gantt_cost(split: Sequence[int]) -> CostModel:
    return uniform(split, 1e-3, Link(2e-4), head=1e-3, cancel=2e-4)


def _provenance(tokens: int, seed: int) -> str:
    import matplotlib

    versions = {
        "ppsd": ppsd.__version__,
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "Theory and simulation only: every time here is a prediction or a unit, none was measured."
        f"\n\nMade by `ppsd-lab paper --tokens {tokens} --seed {seed}`, commit {_commit()}, "
        f"{made}. "
        f"Simulated figures use {tokens} tokens a run. "
        "Formula and settings: arXiv 2509.19368."
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _cell(value: Any) -> str:
    return "—" if value is None else str(value)
