"""Turn records into padded batches: tokens, positions that count, order, draft vocabulary.

Everything here is a function of its arguments, seeds included, so a resumed run sees the same
batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from ppsd import checks
from ppsd.errors import PpsdError
from ppsd.model.draft_vocabulary import prompt_ids
from ppsd.model.tokenizer import Tokenizer
from ppsd.train.records import Record

POOL_BATCHES = 32  # in a shuffled pool, which is sorted by length and cut into batches
PROMPT_WEIGHT = 0.3  # of a prompt's positions: nothing is drafted there, and others wrote the text
FEW = 8  # conversations: what the user says in more of them is a phrase
OUTSIDE = -1  # label of a token that is not scored


@dataclass(frozen=True)
class Example:
    """Token ids [L] (int32); the tokens from index ``start`` on are what the head must guess.

    Those from ``prompt`` on are decoded one by one at run time, the others known beforehand.
    ``opening`` names the conversation, "" for running text; ``said`` are digests of what its user
    says, or of the text (``Record.opening`` and ``prompts``).
    """

    tokens: torch.Tensor
    start: int
    prompt: int = 1
    opening: str = ""
    said: frozenset[str] = frozenset()

    @property
    def targets(self) -> torch.Tensor:
        """Return the tokens to be guessed."""
        return self.tokens[self.start :]


@dataclass(frozen=True)
class Corpus:
    """Tokenised data, and what did not fit: ``cut`` answers lost their end, ``dropped`` all."""

    examples: list[Example]
    cut: int
    dropped: int


@dataclass(frozen=True)
class Encoding:
    """Encoder of records; ``model`` is the fingerprint whose ``target_ids`` are valid.

    ``weights`` are marked by ``weights_mark``: what is kept of a model is of no other.
    """

    tokenizer: Tokenizer
    max_length: int
    model: str
    eos: int | None
    raw: bool = False
    all_positions: bool = False
    weights: str = ""

    @property
    def stamp(self) -> dict[str, Any]:
        """Return what decides which tokens a prompt has, and how many an answer may."""
        template = "" if self.raw else self.tokenizer.about["chat_template"] or ""
        return {
            "model": self.model,
            "weights": self.weights,
            "raw": self.raw,
            "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
            "max_length": self.max_length,
        }

    def prompt(self, record: Record) -> list[int]:
        """Return prompt ids as inference makes them: by chat template, or of the plain text."""
        with checks.inside(record.where, PpsdError):
            if self.raw:
                return self.tokenizer.encode("\n".join(m["content"] for m in record.messages))
            return self.tokenizer.encode_chat(list(record.messages))

    def target(self, record: Record) -> list[int]:
        """Return the answer's ids: those the model wrote, or the text's with its end token."""
        if record.target is None:
            raise PpsdError(
                f"{record.where} has a prompt but no target; add --self-generate to let the "
                "model write one"
            )
        if record.target_ids and record.model == self.model:
            with checks.inside(record.where, PpsdError):
                return self.tokenizer.within_rows(list(record.target_ids))
        return self._plain(record.target) + ([] if self.eos is None else [self.eos])

    def windows(self, record: Record) -> list[Example]:
        """Cut running text into windows of ``max_length``; every token but the first counts."""
        assert record.text is not None
        ids = torch.tensor(self.tokenizer.encode(record.text), dtype=torch.int32)
        return [Example(part, 1) for part in torch.split(ids, self.max_length) if len(part) > 1]

    def all_tokens(self, record: Record) -> torch.Tensor:
        """Return every token of a record, whatever its length; a prompt needs no target here."""
        if record.text is not None:
            return torch.tensor(self.tokenizer.encode(record.text), dtype=torch.int32)
        target = [] if record.target is None else self.target(record)
        return torch.tensor([*self.prompt(record), *target], dtype=torch.int32)

    def _plain(self, text: str) -> list[int]:
        """Return ids of a continuation: without the special tokens that begin a prompt."""
        opening = self.tokenizer.encode("")
        ids = self.tokenizer.encode(text)
        return ids[len(opening) :] if ids[: len(opening)] == opening else ids


def joined(prompt: Sequence[int], target: Sequence[int], encoding: Encoding) -> Example:
    """Make an example of a prompt and its answer, cut at the encoding's ``max_length``."""
    given = max(1, len(prompt))
    ids = [*prompt, *target][: encoding.max_length]
    return Example(
        torch.tensor(ids, dtype=torch.int32), 1 if encoding.all_positions else given, given
    )


def encode_all(records: Iterable[Record], encoding: Encoding) -> Corpus:
    """Encode all records; raises PpsdError when nothing is left that fits."""
    examples: list[Example] = []
    cut = dropped = 0
    prompts: dict[str, list[int]] = {}  # several answers may share one
    for record in records:
        if record.text is not None:
            examples += [replace(e, said=record.prompts) for e in encoding.windows(record)]
            continue
        if record.key not in prompts:
            prompts[record.key] = encoding.prompt(record)
        prompt, target = prompts[record.key], encoding.target(record)
        if len(prompt) >= encoding.max_length or not target:
            dropped += 1
            continue
        cut += len(prompt) + len(target) > encoding.max_length
        example = joined(prompt, target, encoding)
        examples.append(replace(example, opening=record.opening, said=record.prompts))
    if not examples:
        raise PpsdError(
            f"no training example fits in max_length {encoding.max_length} ({dropped} prompts are "
            "as long or longer, or have an empty target)"
        )
    return Corpus(examples, cut, dropped)


def hold_out(
    examples: Sequence[Example], wanted: int, seed: int, read: Set[str] = frozenset()
) -> tuple[list[Example], list[Example]]:
    """Split into training and validation; about a tenth at most, at least one, is held out.

    Answers to one prompt stay together, and so do all turns of conversations that the user opens
    alike, or in which the user says the same later on, so that no held-out text was trained on as a
    prompt of another of them. What many say, such as "go on", ties nothing. What heads have
    ``read`` before, by its digests, is held out only where nothing else is left: there they look
    better than they are.
    """
    groups = _tied(examples)
    if len(groups) < 2:
        raise PpsdError("training needs at least 2 prompts, one of them held out for validation")
    most = max(1, len(examples) // 10)
    count = min(wanted, most)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda group: any(was_read(examples[i], read) for i in groups[group]))
    order.sort(key=lambda group: len(groups[group]) > most)  # long conversations come last
    held: list[int] = []
    for group in order[:-1]:
        if len(held) < count and (not held or len(held) + len(groups[group]) <= most):
            held += groups[group]
    kept = set(range(len(examples))).difference(held)
    return [examples[i] for i in sorted(kept)], [examples[i] for i in held]


def _tied(examples: Sequence[Example]) -> list[list[int]]:
    """Group the indices of examples that belong together, in the order in which they first come."""
    openings: dict[str | bytes, list[int]] = {}
    speakers: dict[str, set[str | bytes]] = {}
    for i, example in enumerate(examples):
        opening = example.opening or example.tokens.numpy().tobytes()
        openings.setdefault(opening, []).append(i)
        for digest in example.said if example.opening else ():  # not the parts of one text
            speakers.setdefault(digest, set()).add(opening)
    leads = {opening: opening for opening in openings}  # each to another of its group, or itself

    def lead(opening: str | bytes) -> str | bytes:
        while leads[opening] != opening:
            leads[opening] = opening = leads[leads[opening]]
        return opening

    for tied in speakers.values():
        first, *others = tied
        for other in others if len(tied) <= FEW else ():
            leads[lead(other)] = lead(first)
    groups: dict[str | bytes, list[int]] = {}
    for opening, indices in openings.items():
        groups.setdefault(lead(opening), []).extend(indices)
    return list(groups.values())


def was_read(example: Example, read: Set[str]) -> bool:
    """Tell if some of what an example's user says is among the digests ``read``."""
    return not example.said.isdisjoint(read)


def count_tokens(texts: Iterable[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """Count each token in ``texts`` (int32 ids each): [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for ids in texts:
        counts += torch.bincount(ids.long(), minlength=vocab_size)
    return counts


def check_draft_vocab(size: int, vocab_size: int) -> None:
    """Raise ConfigError unless so many of the tokens can be scored; 0 means all."""
    allowed = f"in [1, {vocab_size}], or 0 for all tokens"
    checks.integer("draft_vocab", size, 0, vocab_size, allowed)


def choose_draft_vocab(
    targets: torch.Tensor, size: int, more: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the ``size`` most frequent tokens, ascending, and the share of targets lost.

    ``targets`` [V] counts tokens to be guessed, ``more`` [V] those of other text, for a vocabulary
    that also covers what the targets are too few to show. Among equally frequent tokens the lower
    id wins.
    """
    check_draft_vocab(size, len(targets))
    chosen = (targets + more).argsort(descending=True, stable=True)[:size].sort().values
    lost = 1.0 - targets[chosen].sum().item() / max(1, int(targets.sum()))
    return chosen, lost


def plan_epoch(
    lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """Return each batch's indices for one epoch: shuffled, but alike in length within a batch.

    A batch holds at most ``batch_tokens`` padded tokens, or one longer example.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = max(1, POOL_BATCHES * batch_tokens * len(lengths) // max(1, sum(lengths)))
    batches: list[tuple[int, ...]] = []
    for first in range(0, len(order), pool):
        batches += _cut(order[first : first + pool], lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _cut(
    indices: Sequence[int], lengths: Sequence[int], batch_tokens: int
) -> list[tuple[int, ...]]:
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda i: (lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return [tuple(batch) for batch in batches]


@dataclass(frozen=True)
class Batch:
    """``tokens`` [B, T] padded at the end; flattened row ``rows[i]`` must guess ``targets[i]``.

    ``shares`` (float32) of the rows in the loss sum to 1; ``size`` counts tokens without padding.
    """

    examples: tuple[Example, ...]
    tokens: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    shares: torch.Tensor
    size: int


def make_batch(examples: Sequence[Example], device: torch.device) -> Batch:
    """Make a batch padded to its longest example, and list the positions that count."""
    length = max(len(e.tokens) for e in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    rows, weights = [], []
    for i, example in enumerate(examples):
        tokens[i, : len(example.tokens)] = example.tokens
        before = torch.arange(example.start - 1, len(example.tokens) - 1)
        rows.append(before + i * length)
        weights.append(torch.where(before < example.prompt - 1, PROMPT_WEIGHT, 1.0))
    targets = torch.cat([e.targets for e in examples]).long()
    weighed = torch.cat(weights)
    size = sum(len(e.tokens) for e in examples)
    tokens, at, targets, shares = (
        t.to(device) for t in (tokens, torch.cat(rows), targets, weighed / weighed.sum())
    )
    return Batch(tuple(examples), tokens, at, targets, shares, size)


@dataclass(frozen=True)
class Scored:
    """W tokens that heads score in a batch: the draft vocabulary, and all else in its prompts.

    ``ids`` [W]; ``rows`` [W, C] of the LM head; ``labels`` [V]: the index of each token, OUTSIDE
    where it has none. An example's loss is over all of them, its prompt's tokens or another's.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor


class Vocabulary:
    """The draft vocabulary ``ids`` [D], None for all, with the model's LM head ``table`` [V, C]."""

    def __init__(self, ids: torch.Tensor | None, table: torch.Tensor) -> None:
        every = torch.arange(len(table))
        self._table, self._device = table, table.device
        own = every if ids is None else ids.cpu()
        self.size = len(own)
        self._labels = torch.full_like(every, OUTSIDE)
        self._labels[own] = torch.arange(self.size)
        self._common = Scored(
            own.to(self._device),
            table if ids is None else table[ids],
            self._labels.to(self._device),
        )

    def of(self, batch: Batch) -> Scored:
        """Return what is scored in a batch, as in decoding, but for all of its prompts."""
        told = torch.tensor(sorted({i for e in batch.examples for i in _prompt_ids(e)}))
        added = told[self._labels[told] == OUTSIDE].to(self._device)
        if not len(added):
            return self._common
        ids, rows, labels = self._common.ids, self._common.rows, self._common.labels.clone()
        labels[added] = torch.arange(len(added), device=self._device) + self.size
        return Scored(torch.cat([ids, added]), torch.cat([rows, self._table[added]]), labels)

    def sayable(self, batch: Batch, scored: Scored) -> torch.Tensor:
        """Return which of the tokens scored each example may say at run time, [B, W]."""
        others = scored.ids[self.size :].cpu()
        own = [torch.isin(others, torch.tensor(_prompt_ids(e))) for e in batch.examples]
        common = torch.ones(len(own), self.size, dtype=torch.bool)
        return torch.cat([common, torch.stack(own)], 1).to(self._device)


def _prompt_ids(example: Example) -> tuple[int, ...]:
    return prompt_ids(example.tokens[: example.prompt].tolist())
