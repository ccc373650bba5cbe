"""``ppsd acceptance``: how often the drafts of exit heads are accepted, and where."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ppsd import checks
from ppsd.cli import progress
from ppsd.cli.display import draw, log_console
from ppsd.cli.flags import flag
from ppsd.config import DEFAULT_CONTEXT
from ppsd.errors import ConfigError
from ppsd.settings import TEMPLATE_HELP
from ppsd.train.settings import DistillConfig

if TYPE_CHECKING:
    from ppsd.measure.acceptance import Answer, Candidate, Outcome
    from ppsd.measure.workload import Task
    from ppsd.train.run import Teacher
    from ppsd.types import SamplingParams

RESULT, PLOT, OUTCOMES = "acceptance.json", "acceptance.png", "outcomes.jsonl"
LOOKUPS = ("on", "off", "both")
VIEWS = {"category": "by_category", "position": "by_position"}
_measured = functools.partial(flag, panel="What is measured")
_work = functools.partial(flag, panel="How it is computed")


@dataclass
class SubjectOptions:
    """Which heads are asked about which tokens."""

    head: Annotated[str, _measured("Head directories.", metavar="DIR,…")]
    data: Annotated[
        list[Path], _measured("JSONL or text file of prompts; may be repeated.", metavar="FILE")
    ]
    out: Annotated[Path, _measured("Directory of results; a stopped run goes on there.")]
    model: Annotated[
        str | None,
        _measured(
            "Directory, .gguf file or hub id.",
            "-m",
            "--model",
            envvar="PPSD_MODEL",
            show_envvar=False,
        ),
    ] = None
    limit: Annotated[int | None, _measured("Prompts to take of each file, evenly.")] = None
    max_tokens: Annotated[int, _measured("Tokens of an answer.", "-n", "--max-tokens")] = 128
    temperature: Annotated[
        float, _measured("0 is greedy, else coupled sampling.", "-t", "--temperature")
    ] = 0.0
    seed: Annotated[int, _measured("Noise is a function of seed and position.")] = 0
    raw: Annotated[bool, _measured("No chat template.", "--raw")] = False
    chat_template: Annotated[str | None, _measured(TEMPLATE_HELP, metavar="FILE|TEXT")] = None
    lookup: Annotated[
        str, _measured("Prompt lookup beside the heads: on, off or both.", metavar="on|off|both")
    ] = "on"
    decode: Annotated[
        int, _measured("Number of prompts to decode with the engine too, to compare.", min=0)
    ] = 0
    stages: Annotated[
        int, _measured("Stages that --decode runs, and that the expected speedup is for.", min=2)
    ] = 2

    def paths(self) -> list[Path]:
        """Return the head directories; raises ConfigError when there is none."""
        from ppsd.model.head_library import head_directory

        paths = [head_directory(part) for part in self.head.split(",") if part]
        if not paths:
            raise ConfigError("head", self.head, "head directories separated by commas")
        return paths

    def params(self) -> SamplingParams:
        """Return the sampling parameters of the answers."""
        from ppsd.types import SamplingParams

        if self.max_tokens < 2:
            allowed = "at least 2: no draft is made for the last token"
            raise ConfigError("max_tokens", self.max_tokens, allowed)
        return SamplingParams(self.temperature, seed=self.seed, max_tokens=self.max_tokens)

    def tasks(self) -> list[Task]:
        """Return all prompts."""
        from ppsd.measure.workload import load_tasks

        return [task for path in self.data for task in load_tasks(path, self.limit)]


@dataclass
class WorkOptions:
    """Where and how much at once."""

    max_length: Annotated[
        int | None, _work(f"Prompt and answer; the model's, at most {DEFAULT_CONTEXT}.")
    ] = None
    dtype: Annotated[str, _work("auto, bfloat16, float32 or float64.", metavar="DTYPE")] = "auto"
    device: Annotated[str, _work("cpu or cuda.")] = "cpu"
    threads: Annotated[int, _work("CPU threads; 0 takes PyTorch's choice.")] = 0
    generate_batch: Annotated[int, _work("Answers written at once.")] = 16
    batch_tokens: Annotated[int, _work("Padded tokens measured at once.", min=1)] = 4096


def acceptance(
    subject: SubjectOptions,
    work: WorkOptions,
    by: Annotated[str, typer.Option(help="Second table: category or position.")] = "category",
    record: Annotated[
        bool, typer.Option("--record", help="Note α in each head, for plans to go by.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure α of exit heads on the model's own answers, each draft judged as in decoding."""
    checks.one_of("by", by, VIEWS)
    checks.one_of("lookup", subject.lookup, LOOKUPS)
    paths, params, tasks = subject.paths(), subject.params(), subject.tasks()
    from ppsd.measure.acceptance import load_candidates
    from ppsd.measure.acceptance_plot import plot_acceptance
    from ppsd.measure.acceptance_summary import expected_speed
    from ppsd.train.checkpoint import alone_in

    config = _settings(subject, work, paths)
    with alone_in(subject.out):
        progress.set_threads(work.threads)
        teacher = progress.load(subject.model, config, work.device)
        candidates = load_candidates(paths, teacher, subject.lookup)
        for c in candidates:  # stages that do not suit should not be found out at the end
            expected_speed(teacher.stage.spec, c.head.config, 0.0, subject.stages)
        answers = _answers(teacher, tasks, params, work, subject.out)
        outcomes = _measure(teacher, candidates, answers, subject, work)
        result = _result(subject, teacher, candidates, outcomes)
        result["left_out"] = len(tasks) - len(answers)
        if subject.decode:
            _decode(subject, result, teacher, candidates, answers, outcomes)
        _write(subject.out, result, outcomes)
        if record:
            _record(result, candidates)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result, by)
    plot = subject.out / PLOT
    draw(functools.partial(plot_acceptance, result["heads"], result["first_right"], plot))


def _settings(subject: SubjectOptions, work: WorkOptions, paths: Sequence[Path]) -> DistillConfig:
    """Return how to load the frozen model; raises before any weights are loaded."""
    from ppsd.measure.acceptance import exit_layers, labels
    from ppsd.model.source import describe, resolve_model

    labels(paths)
    length, spec = work.max_length, describe(resolve_model(subject.model))
    if length is None:
        length = min(DEFAULT_CONTEXT, spec.max_context)
    return DistillConfig(
        exit_layers(paths, spec),
        max_length=length,
        dtype=work.dtype,
        raw=subject.raw,
        chat_template=subject.chat_template,
    )


def _answers(
    teacher: Teacher, tasks: Sequence[Task], params: SamplingParams, work: WorkOptions, out: Path
) -> list[Answer]:
    from ppsd.measure.acceptance import write_answers

    path = out / f"generated-{_dtype(teacher)}.jsonl"  # another precision may say something else
    with progress.writing() as report:
        return write_answers(teacher, tasks, params, work.generate_batch, path, report)


def _measure(
    teacher: Teacher,
    candidates: Sequence[Candidate],
    answers: Sequence[Answer],
    subject: SubjectOptions,
    work: WorkOptions,
) -> dict[str, list[Outcome]]:
    from ppsd.measure.acceptance import measure

    fields = "{task.completed:,} of {task.total:,} prompts"
    with progress.bar("judging drafts", len(answers), fields) as (bar, task):

        def report(done: int, total: int) -> None:
            if not bar.tasks[0].completed:  # what an earlier call did is not this one's speed
                bar.reset(task, total=total, completed=done, note="")
            bar.update(task, completed=done)

        return measure(
            teacher,
            candidates,
            answers,
            subject.params(),
            subject.out / OUTCOMES,
            batch_tokens=work.batch_tokens,
            in_flight=subject.stages,
            report=report,
        )


def _result(
    subject: SubjectOptions,
    teacher: Teacher,
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> dict[str, Any]:
    from ppsd.measure.acceptance_summary import expected_speed, first_right, held_out, summarize
    from ppsd.provenance import provenance

    heads, spec = {}, teacher.stage.spec
    for c in sorted(candidates, key=lambda c: c.head.config.exit_layer):
        found = summarize(outcomes[c.label])
        config = c.head.config
        about = {name: getattr(config, name) for name in ("kind", "exit_layer", "layers",
                                                          "draft_vocab")}  # fmt: skip
        about |= {
            "lookup": c.lookup,
            "sha256": c.digest,
            "trained_tokens": config.provenance.get("tokens"),
            "held_out": held_out(config),
        }
        speed = expected_speed(spec, config, found["alpha"], subject.stages)
        heads[c.label] = about | found | {"expected": speed}
    ladder = {  # one head an exit
        h["exit_layer"]: label
        for label, h in reversed(heads.items())
        if h["lookup"] or subject.lookup == "off"
    }
    first = {label: outcomes[label] for _, label in sorted(ladder.items())}
    return {
        "model": spec.name,
        "fingerprint": teacher.fingerprint,
        "dtype": _dtype(teacher),
        "device": teacher.stage.plan.device.type,
        "max_tokens": subject.max_tokens,
        "max_length": teacher.encoding.max_length,
        "limit": subject.limit,
        "stages": subject.stages,
        "raw": subject.raw,
        "chat_template": subject.chat_template,
        "temperature": subject.temperature,
        "seed": subject.seed,
        "data": [_file(path) for path in subject.data],
        "heads": heads,
        "first_right": {"boundaries": sorted(ladder)} | first_right(first),
        "provenance": provenance(),
    }


def _dtype(teacher: Teacher) -> str:
    return str(teacher.stage.plan.dtype).removeprefix("torch.")


def _file(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _decode(
    subject: SubjectOptions,
    result: dict[str, Any],
    teacher: Teacher,
    candidates: Sequence[Candidate],
    answers: Sequence[Answer],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> None:
    """Add to each head what the engine judged, on prompts taken evenly."""
    from ppsd.engine.llm import LLM
    from ppsd.measure.acceptance_summary import decode

    count = min(subject.decode, len(answers))
    chosen = [i * len(answers) // count for i in range(count)]
    for c in candidates:
        log_console().print(f"decoding {count} prompts with {c.label}")
        with LLM(
            subject.model,
            chat_template=subject.chat_template,
            stages=subject.stages,
            exit_layer=c.head.config.exit_layer,
            head=str(c.path),
            dtype=result["dtype"],
            devices=(result["device"],),
            max_context=teacher.encoding.max_length,
            lookup=c.lookup,
            gate=False,  # a pause would leave drafts out of the count
        ) as llm:
            those = [answers[i] for i in chosen], [outcomes[c.label][i] for i in chosen]
            result["heads"][c.label]["decoded"] = decode(llm, *those, subject.params())


def _write(out: Path, result: dict[str, Any], outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    from ppsd.train.checkpoint import write_whole

    write_whole(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    for label, found in outcomes.items():
        trace = [hit for outcome in found for hit in outcome.hits]
        write_whole(out / f"trace-{label}.json", json.dumps(trace).encode())


def _record(result: dict[str, Any], candidates: Sequence[Candidate]) -> None:
    from ppsd.model.head_files import record_metrics

    names = ("data", "limit", "max_tokens", "temperature", "stages", "dtype")
    about = {name: result[name] for name in names}
    drawn = "_sampled" if result["temperature"] else ""  # plans go by greedy decoding
    for c in candidates:
        found = result["heads"][c.label]
        name = f"acceptance{drawn}" if c.lookup else f"acceptance{drawn}_alone"
        told = ("alpha", "interval", "judged", "prompts", "outside")
        record_metrics(c.path, name, {each: found[each] for each in told} | about)


def _show(result: dict[str, Any], by: str) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    heads = result["heads"]
    for table in (_overall(heads), _worth(heads), _view(heads, by)):
        console.print(table)
        console.print()
    shares = result["first_right"]["shares"].items()
    firsts = " · ".join(f"{label} {share:.1%}" for label, share in shares)
    console.print(f"first head that is right, by exit layer: {firsts}")
    for label, found in heads.items():
        if "decoded" in found:
            console.print(_decoded(label, found["decoded"]))
    some = next(iter(heads.values()))
    left_out = f", {result['left_out']} left out as too long" if result["left_out"] else ""
    console.print(f"{some['judged']:,} drafts of {some['prompts']} answers judged{left_out}")
    console.print(
        f"computed in {result['dtype']}; expected: {some['expected']['stages']} equal devices, "
        "times by parameters read, hops free"
    )


def _overall(heads: Mapping[str, Any]) -> Table:
    names = ("head", "exit", "α", "95 % interval", "top 2", "top 4", "top 8")
    table = Table(*names, box=None, pad_edge=False)
    for label, h in heads.items():
        between = "–" if h["interval"] is None else "{:.3f}–{:.3f}".format(*h["interval"])
        tops = (f"{h['top'][k]:.3f}" for k in ("2", "4", "8"))
        table.add_row(label, str(h["exit_layer"]), f"{h['alpha']:.3f}", between, *tops)
    return table


def _worth(heads: Mapping[str, Any]) -> Table:
    names = ("head", "held-out α", "not scored", "layer-times", "expected", "ρ*")
    table = Table(*names, box=None, pad_edge=False)
    for label, h in heads.items():
        held_out, expected = (h["held_out"] or {}).get("alpha"), h["expected"]
        table.add_row(
            label,
            "–" if held_out is None else f"{held_out:.3f}",
            f"{h['outside']:.1%}",
            f"{expected['head_layers']:.2f}",
            f"{expected['speedup']:.2f}×",
            f"{expected['paper']:.2f}×",
        )
    return table


def _view(heads: Mapping[str, Any], by: str) -> Table:
    """Tabulate α of every head in every category, or in every bucket of positions."""
    table = Table(by, "judged", *(f"{label} α" for label in heads), box=None, pad_edge=False)
    rows: dict[str, list[dict[str, Any]]] = {}
    for found in heads.values():
        part = found[VIEWS[by]]
        named = part.items() if by == "category" else [(_bucket(b), b) for b in part]
        for name, figures in named:
            rows.setdefault(name, []).append(figures)
    for name, cells in rows.items():
        table.add_row(name, str(cells[0]["judged"]), *(f"{c['alpha']:.3f}" for c in cells))
    return table


def _bucket(figures: Mapping[str, Any]) -> str:
    return f"{figures['first']}–{figures['last']}"


def _decoded(label: str, d: Mapping[str, Any]) -> str:
    off = d["offline"]
    rate = "nothing judged" if d["alpha"] is None else f"α {d['alpha']:.3f}"
    return (
        f"{label} decoded: {d['accepted']} of {d['judged']} accepted ({rate}); computed at once: "
        f"{off['accepted']} of {off['judged']}; {d['equal_tokens']} of {d['prompts']} answers "
        f"equal, {d['differing']} of {d['compared']} drafts judged differently, "
        f"{d['late']} too late to be judged"
    )
