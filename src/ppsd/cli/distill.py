"""``ppsd distill``: train exit heads on what the model itself says."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ppsd.cli import progress
from ppsd.cli.display import draw, log_console
from ppsd.cli.flags import flag
from ppsd.errors import ConfigError, PpsdError
from ppsd.train.settings import DistillConfig

if TYPE_CHECKING:
    from ppsd.train.best import Kept
    from ppsd.train.distill import Forecast, StepReport, Trainer
    from ppsd.train.evaluate import Agreement
    from ppsd.train.records import DataFile, Record
    from ppsd.train.run import DataSummary, Teacher
    from ppsd.train.selfgen import GenerateConfig

GENERATED = "generated.jsonl"
WRITING_SHARE = 0.4  # of a time budget, where the model writes its own targets first
GENERATION = "Self-generation"


@dataclass
class GenerationOptions:
    """The fields of GenerateConfig but for its seed, and whether to generate at all."""

    self_generate: Annotated[
        bool, flag(f"The model writes the targets, into {GENERATED} beside the heads.",
                   "--self-generate", panel=GENERATION),
    ] = False  # fmt: skip
    generate_only: Annotated[
        bool, flag("Write the targets and stop.", "--generate-only", panel=GENERATION)
    ] = False
    generate_batch: Annotated[int, flag("Sequences at once.", panel=GENERATION)] = 64
    max_new: Annotated[int, flag("Tokens of a target.", panel=GENERATION)] = 256
    temperature: Annotated[float, flag("0 is greedy.", panel=GENERATION)] = 0.0

    @property
    def wanted(self) -> bool:
        """Return True if the model is to write the targets."""
        return self.self_generate or self.generate_only

    def config(self, seed: int) -> GenerateConfig:
        """Return how to write; raises ConfigError for what is out of range or has no use."""
        from ppsd.train.selfgen import GenerateConfig

        for name in ("generate_batch", "max_new", "temperature"):
            value = getattr(self, name)
            if not self.wanted and value != getattr(GenerationOptions, name):
                raise ConfigError(name, value, "left out without --self-generate")
        return GenerateConfig(self.generate_batch, self.max_new, self.temperature, seed)


def distill(
    config: DistillConfig,
    generation: GenerationOptions,
    data: Annotated[
        list[str],
        typer.Option(help="JSONL of prompt/target, messages or text; a text file; a hub dataset. "
                     "May be repeated.", metavar="FILE"),
    ],
    vocab_data: Annotated[
        list[str],
        typer.Option(help="More text to count tokens in for the draft vocabulary; as --data.",
                     metavar="FILE", default_factory=list, show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the run; a stopped run goes on there.")],
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="Directory, .gguf file or hub id.",
                     envvar="PPSD_MODEL", show_envvar=False),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Keep the frozen model's rows here: later epochs and runs read them."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes PyTorch's choice.")] = 0,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 100,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
) -> None:  # fmt: skip
    """Train exit heads by self-distillation; the same command continues a stopped run."""
    from ppsd.model.source import describe, resolve_model
    from ppsd.train.checkpoint import alone_in
    from ppsd.train.records import read_data

    writing = generation.config(config.seed)
    records, files = read_data(data)
    counted = read_data(vocab_data)
    config = config.suited(describe(resolve_model(model)).num_layers, device)
    progress.set_threads(threads)
    with alone_in(out):
        teacher = progress.load(model, config, device)
        if generation.wanted:
            only = generation.generate_only
            minutes = config.minutes * (1.0 if only else WRITING_SHARE)
            path = _generate(teacher, config, records, writing, out, features, minutes, only)
            if only:
                return
            config = dataclasses.replace(config, minutes=config.minutes - minutes)
            written, more = read_data([str(path)] if path.exists() else [])
            records, files = _answered(records, written), [*files, *more]
        every = (validate_every, checkpoint_every)
        _train(teacher, config, records, files, out, features, every, counted)


def _answered(records: Sequence[Record], written: Sequence[Record]) -> list[Record]:
    """Return running texts as they are, and of what was written the answers to these prompts.

    They come in an order that does not depend on kills while they were written.
    """
    asked = {record.key for record in records}
    texts = [record for record in records if record.text is not None]
    answers = {record.key: record for record in written if record.key in asked}
    return [*texts, *(answers[key] for key in sorted(answers))]


def _generate(
    teacher: Teacher,
    training: DistillConfig,
    records: Sequence[Record],
    config: GenerateConfig,
    out: Path,
    features: Path | None,
    minutes: float,
    only: bool,
) -> Path:
    """Write what is missing of the answers, and return their file.

    Unless they are all that is wanted, training that has begun goes on with those that there are.
    """
    from ppsd.train.checkpoint import RunDirectory
    from ppsd.train.data import check_draft_vocab
    from ppsd.train.run import open_features, read_starts
    from ppsd.train.targets import write_targets

    # What training would refuse is refused now, not after hours of writing.
    read_starts(teacher, training)
    check_draft_vocab(training.draft_vocab, teacher.stage.spec.vocab_size)
    path = out / GENERATED
    if RunDirectory(out, {}).begun and not only:
        return path
    store = None if features is None else open_features(teacher, training, features)
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    with progress.writing() as report:
        skipped = write_targets(
            teacher.stage,
            records,
            teacher.encoding,
            config,
            path,
            report,
            features=store,
            deadline=deadline,
        )
    if skipped:
        text = f"{skipped} prompts leave no room for an answer within max_length and were skipped"
        log_console().print(text, highlight=False)
    if not path.exists() and all(record.text is None for record in records):
        raise PpsdError(
            "no answer was written; give shorter prompts, a larger --max-length, or more --minutes"
        )
    return path


def _train(
    teacher: Teacher,
    config: DistillConfig,
    records: Sequence[Record],
    files: Sequence[DataFile],
    out: Path,
    features: Path | None,
    every: tuple[int, int],
    counted: tuple[Sequence[Record], Sequence[DataFile]],
) -> None:
    from ppsd.train.distill import Cadence
    from ppsd.train.plot import FILE, plot_run
    from ppsd.train.result import Origin, check_heads, check_room, save_heads
    from ppsd.train.run import prepare_run

    console = log_console()
    vocabulary, more = counted
    files = [*files, *(dataclasses.replace(file, use="draft vocabulary") for file in more)]
    with progress.bar("running the frozen model", 1, "{task.fields[note]}") as (bar, task):
        bar.update(task, visible=features is not None)

        def filling(done: int, total: int) -> None:
            speed = progress.speed(done, bar.tasks[0].elapsed)
            note = f"{done:,} of {total:,} tokens · {speed} tokens/s"
            bar.update(task, completed=done, total=total, note=note)

        cadence = Cadence(*every)
        trainer, summary = prepare_run(
            teacher, config, records, files, out, cadence, features, filling, vocabulary
        )
    console.print(_data_line(summary, config), highlight=False)
    if trainer.directory.finished():
        check_heads(trainer, teacher.stage.spec)
        console.print(
            f"this run is finished, and its heads are in {out}; to train anew give another --out"
        )
        return
    check_room(trainer)
    if (forecast := trainer.forecast()).tokens:
        console.print(_forecast_line(trainer, forecast), highlight=False)
    agreement = _run(trainer)
    if trainer.gave_up:
        console.print(
            f"training ended after step {trainer.step:,} of {trainer.steps:,}: held-out α stayed "
            "below its start"
        )
    name = teacher.stage.spec.name
    origin = Origin(name, teacher.identity, files, summary.lost_mass)
    places = save_heads(trainer, origin, agreement)
    trainer.directory.finish()
    console.print(_result_table(places, agreement, trainer.best.kept))
    for layer, kept in trainer.best.kept.items():
        if kept.step == 0:
            console.print(_no_help(layer, kept.start, trainer.last[layer].alpha))
    console.print(_worth_line(trainer.lookup, agreement), highlight=False)
    console.print(_throughput_line(trainer.directory.metrics(), features), highlight=False)
    draw(functools.partial(plot_run, trainer.directory.metrics(), trainer.directory.path / FILE))


def _forecast_line(trainer: Trainer, forecast: Forecast) -> str:
    """Tell how long training will take, and what held-out α to expect of it."""
    from ppsd.train.gain import TOKENS

    starts = {layer: kept.start for layer, kept in trainer.best.kept.items()}
    begins = "/".join(f"{alpha:.2f}" for alpha in starts.values())
    ends = "/".join(f"{alpha:.2f}" for alpha in forecast.alpha.values())
    expected = f"may come to {ends}, as far as the default model's heads rose with so many tokens"
    if forecast.alpha == starts:
        expected = "can hardly rise with so few tokens"
        if any(begun.tokens >= TOKENS[-1] for begun in trainer.starts.values()):
            expected = "may rise: the default model's heads have read no more"
    minutes = round(forecast.seconds / 60)
    span = f"about {minutes} min" if minutes else "less than a minute"
    return (
        f"training takes {span} ({forecast.tokens:,} tokens); held-out α begins at {begins} and "
        f"{expected}"
    )


def _worth_line(lookup: float, agreement: Mapping[int, Agreement]) -> str:
    """Compare the heads, which draft together with prompt lookup, with lookup alone."""
    text = f"prompt lookup alone would be right for {lookup:.3f} of these tokens"
    useless = ", ".join(str(layer) for layer, found in agreement.items() if found.alpha <= lookup)
    return f"{text}: drop exit {useless}, and take --head lookup" if useless else text


def _run(trainer: Trainer) -> dict[int, Agreement]:
    start = -1
    fields = "{task.fields[note]}"
    with progress.bar("training", trainer.total_tokens, fields) as (bar, task):

        def report(r: StepReport) -> None:
            nonlocal start
            if start < 0:  # a resumed run's speed is that of what it does now
                start = r.tokens
                bar.reset(task, total=r.total_tokens, completed=r.tokens, note="")
            loss = "/".join(f"{x:.2f}" for x in r.loss.values())
            alpha = "/".join(f"{x:.3f}" for x in r.alpha.values())
            speed = progress.speed(r.tokens - start, bar.tasks[0].elapsed)
            note = f"{r.tokens:,} tokens · {speed} tokens/s · loss {loss} · held-out α {alpha}"
            bar.update(task, completed=r.tokens, note=note)

        return trainer.run(report)


def _data_line(summary: DataSummary, config: DistillConfig) -> str:
    scored = "all tokens"
    if config.draft_vocab:
        scored = f"{config.draft_vocab:,} tokens, {summary.lost_mass:.2%} of targets outside it"
    held = f"{summary.held_out} more held out"
    if summary.read_before:
        held += f" ({summary.read_before} of them read by --start before: held-out α flatters it)"
    if summary.read_unknown:
        held += " (a head of --start has no prompts.txt: it may have read them before)"
    return (
        f"{summary.examples:,} examples, {summary.tokens:,} tokens, {summary.targets:,} of them "
        f"targets; {summary.cut} cut and {summary.dropped} dropped at max_length "
        f"{config.max_length}; {held}; draft vocabulary: {scored}"
    )


def _no_help(layer: int, start: float, last: float) -> str:
    return (
        f"exit {layer}: training did not help: held-out α was {start:.3f} before the first step "
        f"and {last:.3f} after the last; the head is kept as it began. Try more data, or a lower "
        "--learning-rate"
    )


def _result_table(
    places: dict[int, Path], agreement: dict[int, Agreement], kept: dict[int, Kept]
) -> Table:
    titles = ("exit", "held-out α", "95 % interval", "at the start", "of step", "top 4", "head")
    table = Table(*titles, box=None, pad_edge=False)
    for layer, path in places.items():
        found, best = agreement[layer], kept[layer]
        between = "–" if found.between is None else "{:.3f}–{:.3f}".format(*found.between)
        figures = (f"{found.alpha:.3f}", between, f"{best.start:.3f}", str(best.step))
        table.add_row(str(layer), *figures, f"{found.top4:.3f}", str(path))
    return table


def _throughput_line(metrics: Sequence[dict[str, Any]], features: Path | None) -> str:
    steps = [record for record in metrics if "loss" in record]
    if not steps:
        return "no step was made: the heads are as they began"
    tokens = steps[-1]["tokens"]
    whole, forward = (sum(s[name] for s in steps) for name in ("seconds", "forward_seconds"))
    if features is not None:
        return f"{tokens / whole:.0f} tokens/s with the frozen model's rows read from {features}"
    return (
        f"{tokens / whole:.0f} tokens/s, {forward / whole:.2f} of the frozen forward's own "
        f"{tokens / forward:.0f} tokens/s"
    )
