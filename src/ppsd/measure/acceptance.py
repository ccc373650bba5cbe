"""How often exit heads say what the model says: drafts judged as in inference, many rows at once.

With one token a block (m = 1) and greedy or coupled sampling the engine commits the model's own
sequence, and a draft is judged only when all before it is that sequence: after a miss the next
draft follows the corrected token. So whether a judged draft is accepted is a function of the
model's own sequence alone, and one forward over it judges every position for every head. Which
verified row a draft can rest on is a function of the misses before it, and of how many blocks are
in flight.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ppsd.errors import ConfigError, HeadError, PpsdError
from ppsd.measure.workload import Task
from ppsd.model.draft_vocabulary import NEWEST, prompt_ids
from ppsd.model.exit_head import ExitHead, load_head
from ppsd.model.head_files import read_head_config, weights_digest
from ppsd.model.spec import ModelSpec
from ppsd.model.stage import StagePlan
from ppsd.speculation.lookup import CONFIDENCE, LENGTHS, find, mixed
from ppsd.speculation.sampling import Sampler, Stream, gumbel
from ppsd.train.batched import head_forward, teacher_forward
from ppsd.train.checkpoint import append_line, continue_lines
from ppsd.train.data import plan_epoch
from ppsd.train.feedback import take_verified
from ppsd.train.records import Record, read_data
from ppsd.train.run import Teacher
from ppsd.train.selfgen import GenerateConfig
from ppsd.train.targets import GenerateReport, write_targets
from ppsd.types import SamplingParams

CHUNK_ROWS = 64  # rows whose logits over the whole vocabulary exist at once
WORST_RANK = 8  # ranks beyond are written as this
KNOWN_RANKS = range(-1, WORST_RANK + 1)
OUTSIDE = -1  # rank of a token that the head does not score: not in its vocabulary or the prompt


@dataclass(frozen=True)
class Answer:
    """A prompt (``tokens[:start]``) and the model's own continuation.

    ``judged``: how many of its tokens meet a draft in PPSD: all, but not one at the very limit of
    tokens, before which no draft is made because it could not be fed.
    """

    id: str
    category: str
    tokens: tuple[int, ...]
    start: int
    judged: int


@dataclass(frozen=True)
class Candidate:
    """A head to be measured, with prompt ``lookup`` or alone; ``digest`` is that of its weights."""

    label: str
    path: Path
    head: ExitHead
    digest: str
    lookup: bool = True


@dataclass(frozen=True)
class Outcome:
    """One head on one answer.

    ``ranks[i]``: how many tokens the head prefers to the model's own, counted up to WORST_RANK;
    0 is an accepted draft, OUTSIDE a token that the head does not score.
    """

    id: str
    category: str
    ranks: tuple[int, ...]

    @property
    def hits(self) -> tuple[int, ...]:
        """Return 1 for every accepted draft, 0 for every other."""
        return tuple(int(rank == 0) for rank in self.ranks)


def labels(paths: Sequence[Path]) -> list[str]:
    """Return short names of head directories; raises ConfigError when two would be the same."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    clash = len(set(names)) < len(names)
    found = [f"{p.parent.name}-{p.name}" for p in resolved] if clash else names
    if len(set(found)) < len(found):
        given = ",".join(str(path) for path in paths)
        raise ConfigError("head", given, "directories of different names")
    return found


def exit_layers(paths: Sequence[Path], spec: ModelSpec) -> tuple[int, ...]:
    """Return the exit layers of head directories, each once, ascending.

    Raises HeadError for a head at a layer that the model has not.
    """
    layers = {path: read_head_config(path).exit_layer for path in paths}
    for path, layer in layers.items():
        if layer >= spec.num_layers:
            layered = f"{spec.name}, which has {spec.num_layers} layers"
            raise HeadError(f"{path} is a head for exit {layer}, and not of {layered}")
    return tuple(sorted(set(layers.values())))


def load_candidates(paths: Sequence[Path], teacher: Teacher, lookup: str = "on") -> list[Candidate]:
    """Load heads for the teacher's model; raises HeadError for those of another model.

    Prompt ``lookup`` is on (as in the engine by default), off, or both: then the heads come again
    without it, named "… alone".
    """
    stage = teacher.stage
    candidates = []
    for label, path in zip(labels(paths), paths, strict=True):
        layer = read_head_config(path).exit_layer
        plan = StagePlan(0, layer, stage.plan.max_context, stage.plan.dtype, stage.plan.device)
        whose = (teacher.source, teacher.identity)
        head = load_head(path, stage.spec, plan, *whose, stage.embedding)
        digest = weights_digest(path)
        candidates.append(Candidate(label, path, head, digest, lookup != "off"))
    if lookup == "both":
        candidates += [replace(c, label=f"{c.label} alone", lookup=False) for c in candidates]
    return candidates


def write_answers(
    teacher: Teacher,
    tasks: Sequence[Task],
    params: SamplingParams,
    batch: int,
    path: Path,
    report: Callable[[GenerateReport], None],
) -> list[Answer]:
    """Let the model answer all tasks into the JSONL ``path``, ``batch`` at once.

    What ``path`` already answers is kept. With a temperature the noise is that of inference. Tasks
    that leave no room for two tokens are left out; raises PpsdError when none is left.
    """
    records = [_record(task) for task in tasks]
    config = GenerateConfig(batch, params.max_tokens, params.temperature, params.seed)
    encoding = teacher.encoding

    def noise(_: object) -> Callable[[int, int], torch.Tensor]:
        return lambda position, count: gumbel(params.seed, position, count)

    write_targets(teacher.stage, records, encoding, config, path, report, noise)
    written = {r.key: r for r in read_data([str(path)])[0]} if path.exists() else {}
    found = [written[r.key] for r in records if r.key in written]
    kept = [task for task, r in zip(tasks, records, strict=True) if r.key in written]
    answers = [_answer(teacher, *pair, params) for pair in zip(kept, found, strict=True)]
    if not (answers := [a for a in answers if a.judged > 0]):
        raise PpsdError(f"no prompt leaves room for two tokens within {encoding.max_length}")
    return answers


def _record(task: Task) -> Record:
    about = (("id", task.id), ("category", task.category))
    return Record(f"task {task.id}", task.messages, about=about)


def _answer(teacher: Teacher, task: Task, record: Record, params: SamplingParams) -> Answer:
    prompt = teacher.encoding.prompt(record)
    target = teacher.encoding.target(record)
    limit = min(params.max_tokens, teacher.encoding.max_length - len(prompt))
    judged = min(len(target), limit - 1)
    return Answer(task.id, task.category, (*prompt, *target), len(prompt), judged)


def measure(
    teacher: Teacher,
    candidates: Sequence[Candidate],
    answers: Sequence[Answer],
    params: SamplingParams,
    path: Path,
    *,
    batch_tokens: int,
    in_flight: int = 2,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, list[Outcome]]:
    """Judge every candidate on every answer; outcomes by label, in the order of ``answers``.

    Outcomes are appended to the JSONL ``path`` as they are made, and those it already holds are
    not made again. ``batch_tokens`` padded tokens run at once; ``in_flight`` blocks of one token
    are decoded at once, which matters to heads with feedback. ``report`` hears how many answers
    are done, and of how many.
    """
    decisive = (teacher.encoding.weights, teacher.stage.plan.dtype, in_flight)
    store = _Store(path, " ".join(map(str, (params.temperature, params.seed, *decisive))))
    todo = [a for a in answers if any(not store.has(c, a) for c in candidates)]
    lengths = [a.start + a.judged for a in todo]
    done = len(answers) - len(todo)
    report(done, len(answers))
    for indices in plan_epoch(lengths, batch_tokens, 0, 0) if todo else []:
        batch = [todo[i] for i in indices]
        missing = [c for c in candidates if any(not store.has(c, a) for a in batch)]
        for candidate, answer, ranks in judge_batch(teacher, missing, batch, params, in_flight):
            store.add(candidate, answer, ranks)
        done += len(batch)
        report(done, len(answers))
    return {c.label: [store.outcome(c, a) for a in answers] for c in candidates}


class _Store:
    """Outcomes on disk, found by what decides them; ``settings`` is what does besides head and
    answer.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self._path = path
        self._settings = settings
        try:
            self._ranks = {row["key"]: tuple(row["ranks"]) for row in continue_lines(path)}
        except (ValueError, KeyError, TypeError) as error:
            raise PpsdError(f"{path} does not hold measured outcomes: {error!r}") from error

    def _key(self, candidate: Candidate, answer: Answer) -> str:
        config = candidate.head.config
        reads = (config.exit_layer, config.feedback, config.copy_gate)
        parts = (config.kind, config.layers, config.mlp, *reads)
        what = (candidate.digest, parts, NEWEST, candidate.lookup and (LENGTHS, CONFIDENCE))
        decisive = (*what, answer.tokens, answer.start, answer.judged, self._settings)
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def has(self, candidate: Candidate, answer: Answer) -> bool:
        return self._key(candidate, answer) in self._ranks

    def add(self, candidate: Candidate, answer: Answer, ranks: tuple[int, ...]) -> None:
        if self.has(candidate, answer):
            return
        key = self._key(candidate, answer)
        about = {"key": key, "head": candidate.label, "id": answer.id, "category": answer.category}
        append_line(self._path, about | {"ranks": ranks})
        self._ranks[key] = ranks

    def outcome(self, candidate: Candidate, answer: Answer) -> Outcome:
        ranks = self._ranks[self._key(candidate, answer)]
        if len(ranks) != answer.judged or not all(rank in KNOWN_RANKS for rank in ranks):
            raise PpsdError(f"{self._path} holds no outcome of {answer.judged} drafts: {ranks}")
        return Outcome(answer.id, answer.category, ranks)


@torch.inference_mode()
def judge_batch(
    teacher: Teacher,
    candidates: Sequence[Candidate],
    answers: Sequence[Answer],
    params: SamplingParams,
    in_flight: int,
) -> Iterator[tuple[Candidate, Answer, tuple[int, ...]]]:
    """Run one forward over ``answers``, then every head over the rows of its exit layer."""
    length = max(a.start + a.judged for a in answers)
    tokens = torch.zeros(len(answers), length, dtype=torch.int64)
    for i, a in enumerate(answers):
        tokens[i, : a.start + a.judged] = torch.tensor(a.tokens[: a.start + a.judged])
    exits = {c.head.config.exit_layer for c in candidates}
    model = teacher.stage
    feedback = any(c.head.config.feedback for c in candidates)
    depth = model.spec.num_layers if feedback else max(exits)
    features = teacher_forward(model, tokens.to(model.plan.device), exits, depth)
    vocab = model.spec.num_tokens
    for c in candidates:
        rows = head_forward(c.head, features.exits[c.head.config.exit_layer], len(answers))
        for i, a in enumerate(answers):
            first = i * length + a.start - 1
            judged = slice(first, first + a.judged)
            sampler = Sampler(params, a.start, frozenset(), vocab)
            c.head.begin(0, prompt_ids(a.tokens[: a.start]))
            drafts = _by_lag(c.head, rows[judged], features.last[judged], in_flight)
            yield c, a, _ranks(c.lookup, drafts, a, sampler)


Said = tuple[torch.Tensor, torch.Tensor]  # a head's logits [V] and copy odds [LENGTHS]


def _by_lag(
    head: ExitHead, rows: torch.Tensor, last: torch.Tensor, in_flight: int
) -> Iterator[list[Said]]:
    """Return the head's answers to rows [n, C] with a verified row 1, 2, … positions before.

    The last of them are for all longer lags; a head without feedback has one for all.
    """
    lags = range(1, in_flight + 1 if head.config.feedback else 2)
    for first in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[first : first + CHUNK_ROWS]
        positions = torch.arange(first, first + len(chunk), device=last.device)
        done = [head.finish(chunk, take_verified(last, positions - lag)) for lag in lags]
        said = [zip(head.logits(f, 0), head.copy_odds(f), strict=True) for f in done]
        yield from (list(lags) for lags in zip(*said, strict=True))


def _ranks(
    lookup: bool, by_lag: Iterator[list[Said]], answer: Answer, sampler: Sampler
) -> tuple[int, ...]:
    """Rank each judged token in the scores the draft is the maximum of."""
    tokens = torch.tensor(answer.tokens)
    ranks: list[int] = []
    restart = 0  # the row of the newest token that replaced a draft
    for i, lags in enumerate(by_lag):
        position = answer.start + i
        history = tokens[:position]
        logits, odds = lags[min(i - restart, len(lags) - 1)]
        if lookup and (match := find(history)):
            logits = mixed(logits, match, odds)
        scores = sampler.scores(logits, history, Stream.TARGET)
        ranks.append(rank(scores, answer.tokens[position]))
        restart = restart if ranks[-1] == 0 else i + 1
    return tuple(ranks)


def rank(scores: torch.Tensor, token: int) -> int:
    """Return how many tokens beat ``token`` in ``scores`` [V], up to WORST_RANK; OUTSIDE if -inf.

    Among equals the lower id comes first, as everywhere.
    """
    own = scores[token]
    if own == -torch.inf:
        return OUTSIDE
    before = int((scores > own).sum()) + int((scores[:token] == own).sum())
    return min(before, WORST_RANK)
