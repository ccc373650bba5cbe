"""Self-generated targets as a file that grows: written as answers finish, continued after a stop.

Imported by cli/ and bench/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ppsd.errors import PpsdError
from ppsd.model.stage import Stage
from ppsd.train.checkpoint import append_line, continue_lines
from ppsd.train.data import Encoding, joined
from ppsd.train.features import FeatureStore
from ppsd.train.records import Record
from ppsd.train.selfgen import BatchGenerator, GenerateConfig, Noise, Request

POOL = 1024  # prompts are encoded, and those of like length answered together, so many at a time


@dataclass(frozen=True)
class GenerateReport:
    """Where generation stands: prompts answered, of how many, and tokens written by this call."""

    done: int
    total: int
    tokens: int


def write_targets(
    model: Stage,
    records: Sequence[Record],
    encoding: Encoding,
    config: GenerateConfig,
    path: Path,
    report: Callable[[GenerateReport], None],
    noise: Callable[[Request], Noise] | None = None,
    features: FeatureStore | None = None,
    deadline: float = float("inf"),
) -> int:
    """Answer every distinct prompt of ``records`` into the JSONL ``path``; give the number skipped.

    Prompts that ``path`` already answers are not asked again; those that leave no room for an
    answer are skipped. The model's rows of what is answered now go to ``features``. No answer is
    begun after ``deadline`` (of time.monotonic). Raises PpsdError when ``path`` was written with
    other settings.
    """
    prompts = {r.key: r for r in records if r.messages}
    if not prompts:
        raise PpsdError("self-generation needs prompts, and the data has none (only plain text)")
    stamp = {"model": encoding.model, **_stamp(config)}
    done = _answered(path, stamp)
    waiting = [key for key in prompts if key not in done]
    skipped: list[str] = []

    def requests(keys: Sequence[str]) -> Iterator[Request]:
        """Give requests whose prompts leave room, the longest of these ``keys`` first."""
        encoded = [Request(key, encoding.prompt(prompts[key])) for key in keys]
        skipped.extend(r.key for r in encoded if len(r.prompt) >= encoding.max_length)
        fitting = (r for r in encoded if len(r.prompt) < encoding.max_length)
        yield from sorted(fitting, key=lambda r: -len(r.prompt))

    answered, tokens = len(prompts) - len(waiting), 0
    report(GenerateReport(answered, len(prompts), tokens))
    eos_ids = set(model.spec.eos_ids)
    generator = BatchGenerator(
        model,
        config,
        eos_ids=eos_ids,
        vocab_size=model.spec.num_tokens,
        max_length=encoding.max_length,
        noise=noise,
        keep=features.layers if features else (),
        deadline=deadline,
    )
    pools = _pools(waiting, config.seed)
    for answer in generator.run(r for pool in pools for r in requests(pool)):
        request, ids = answer.request, answer.ids
        record = prompts[request.key]
        if features:
            features.add(joined(request.prompt, ids, encoding), answer.rows)
        target = {"target": encoding.tokenizer.decode(ids), "target_ids": ids}
        about = {"key": request.key, **dict(record.about), "messages": list(record.messages)}
        ending = {"finish_reason": "stop" if ids[-1] in eos_ids else "length"}
        append_line(path, about | target | ending | stamp)
        answered, tokens = answered + 1, tokens + len(ids)
        report(GenerateReport(answered, len(prompts) - len(skipped), tokens))
    report(GenerateReport(answered, len(prompts) - len(skipped), tokens))
    return len(skipped)


def _stamp(config: GenerateConfig) -> dict[str, Any]:
    """What decides an answer; the batch does not."""
    return {name: value for name, value in asdict(config).items() if name != "batch"}


def _answered(path: Path, stamp: dict[str, Any]) -> set[str]:
    """Keys in ``path``."""
    try:
        rows = continue_lines(path)
        for name, value in stamp.items():
            if other := [row[name] for row in rows if row[name] != value]:
                raise PpsdError(
                    f"{path} was written with {name} {other[0]!r}, not {value!r}; give another "
                    "--out, or the same settings to continue it"
                )
        return {str(row["key"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise PpsdError(f"{path} does not hold self-generated targets: {error!r}") from error


def _pools(keys: Iterable[str], seed: int) -> Iterator[list[str]]:
    """Give the keys shuffled, POOL at a time, so that a part of the file is a fair sample."""
    keys = sorted(keys)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    for first in range(0, len(order), POOL):
        yield [keys[i] for i in order[first : first + POOL]]
