"""Write self-generated targets to a file as answers finish, and continue it after a stop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ppsd.errors import PpsdError
from ppsd.model.stage import Stage
from ppsd.train.checkpoint import append_line, continue_lines, write_whole
from ppsd.train.data import Encoding, joined
from ppsd.train.features import FeatureStore
from ppsd.train.records import Record
from ppsd.train.selfgen import BatchGenerator, GenerateConfig, Noise, Request

UNDER_WAY = ".under-way.json"  # behind the name of the targets' file
SAVE_EVERY_S = 30.0
MAX_NEW = "--max-new (in acceptance --max-tokens)"  # as the user knows it
POOL = 1024  # prompts are encoded, and those of like length answered together, so many at a time


@dataclass(frozen=True)
class GenerateReport:
    """Progress of generation: prompts answered, of how many; tokens written and read by this call.

    ``share`` of the work is done, answers under way counted as if they were to use all their room.
    """

    done: int
    total: int
    tokens: int
    read: int
    share: float


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

    Prompts that ``path`` already answers are not asked again, answers that were under way go on
    where they were saved last, and prompts that leave no room for an answer are skipped. The
    model's rows of what is answered now go to ``features``. No answer is begun after ``deadline``
    (of time.monotonic). Raises PpsdError when ``path`` was written with other settings.
    """
    prompts = {r.key: r for r in records if r.messages}
    if not prompts:
        raise PpsdError("self-generation needs prompts, and the data has none (only plain text)")
    stamp = {**encoding.stamp, **_stamp(config), "dtype": str(model.plan.dtype)}
    waiting = sorted(prompts.keys() - _answered(path, stamp))
    draft = _Draft(path, stamp, encoding, waiting)
    skipped: list[str] = []
    answered = len(prompts) - len(waiting)

    def tell() -> None:
        total = len(prompts) - len(skipped)
        share = (answered + generator.under_way_share) / total if total else 1.0
        report(GenerateReport(answered, total, generator.written, generator.read, share))

    def stepped() -> None:
        tell()
        draft.save(generator.under_way)

    generator = BatchGenerator(
        model,
        config,
        eos_ids=model.spec.eos_ids,
        vocab_size=model.spec.num_tokens,
        max_length=encoding.max_length,
        noise=noise,
        keep=features.layers if features else (),
        deadline=deadline,
        stepped=stepped,
    )
    tell()
    for answer in generator.run(draft.requests(waiting, prompts, skipped)):
        request, ids = answer.request, answer.ids
        if features:
            features.add(joined(request.prompt, ids, encoding), answer.rows)
        text = encoding.tokenizer.decode(ids)
        append_line(path, _row(prompts[request.key], ids, text, model.spec.eos_ids) | stamp)
        draft.begun.pop(request.key, None)
        answered += 1
        tell()
    tell()  # prompts were skipped meanwhile
    draft.close()
    return len(skipped)


def _row(record: Record, ids: list[int], text: str, eos_ids: Collection[int]) -> dict[str, Any]:
    about = {"key": record.key, **dict(record.about), "messages": list(record.messages)}
    reason = "stop" if ids[-1] in eos_ids else "length"
    return about | {"target": text, "target_ids": ids, "finish_reason": reason}


class _Draft:
    """Answers under way, in a file beside the targets, so that a kill costs half a minute.

    ``begun`` are those that an earlier call left, and this one has not finished.
    """

    def __init__(
        self, path: Path, stamp: dict[str, Any], encoding: Encoding, waiting: Collection[str]
    ) -> None:
        self._encoding, self._seed = encoding, int(stamp["seed"])
        self.begun: dict[str, list[int]] = {}
        self._path = path.with_name(path.name + UNDER_WAY)
        self._stamp = stamp
        self._saved = time.monotonic()
        with suppress(
            OSError, ValueError, LookupError, TypeError, AttributeError
        ):  # absent or not ours
            record = json.loads(self._path.read_text())
            if record["stamp"] == stamp:
                saved = record["answers"]
                self.begun = {key: list(map(int, saved[key])) for key in waiting if key in saved}

    def requests(
        self, keys: Sequence[str], records: Mapping[str, Record], skipped: list[str]
    ) -> Iterator[Request]:
        """Give requests pool by pool, what was begun and then long prompts first.

        ``skipped`` grows meanwhile.
        """
        limit = self._encoding.max_length
        for pool in _pools(keys, self.begun, self._seed):
            requests = [self._request(key, records[key]) for key in pool]
            skipped += [r.key for r in requests if len(r.prompt) >= limit]
            fitting = (r for r in requests if len(r.prompt) < limit)
            yield from sorted(fitting, key=lambda r: (r.key not in self.begun, -len(r.prompt)))

    def _request(self, key: str, record: Record) -> Request:
        """Return a request that goes on where it was saved, if that leaves room for more."""
        prompt = self._encoding.prompt(record)
        request = Request(key, prompt, self.begun.get(key, ()))
        whole = len(request.tokens) >= self._encoding.max_length
        return Request(key, prompt) if whole else request

    def save(self, answers: Callable[[], dict[str, list[int]]]) -> None:
        """Write what is under way, and what was and has not been taken up, every SAVE_EVERY_S."""
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self._write(self.begun | answers())

    def close(self) -> None:
        """Forget what was under way, but for what time did not suffice to take up."""
        if self.begun:
            self._write(self.begun)
        else:
            self._path.unlink(missing_ok=True)

    def _write(self, answers: Mapping[str, Sequence[int]]) -> None:
        record = {"stamp": self._stamp, "answers": answers}
        write_whole(self._path, json.dumps(record).encode())
        self._saved = time.monotonic()


def _stamp(config: GenerateConfig) -> dict[str, Any]:
    """Return the settings that decide an answer; the batch does not, but for rounding."""
    return {name: value for name, value in asdict(config).items() if name != "batch"}


def _answered(path: Path, stamp: dict[str, Any]) -> set[str]:
    """Return the keys in ``path``."""
    try:
        rows = continue_lines(path)
        keys = {str(row["key"]) for row in rows}
        for name, value in stamp.items():
            if other := [row.get(name) for row in rows if row.get(name) != value]:
                told = MAX_NEW if name == "max_new" else name
                raise PpsdError(
                    f"{path} was written with {told} {other[0]!r}, not {value!r}; give another "
                    "--out, or the same settings to continue it"
                )
        return keys
    except (ValueError, KeyError, TypeError) as error:
        raise PpsdError(f"{path} does not hold self-generated targets: {error!r}") from error


def _pools(keys: Iterable[str], begun: Collection[str], seed: int) -> Iterator[list[str]]:
    """Give the keys shuffled, POOL at a time, so that a part of the file is a fair sample.

    Answers under way come first.
    """
    keys = sorted(keys)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = sorted((keys[i] for i in order), key=lambda key: key not in begun)
    for first in range(0, len(shuffled), POOL):
        yield shuffled[first : first + POOL]
