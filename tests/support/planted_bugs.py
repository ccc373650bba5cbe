"""Bugs to plant in the engine, the protocol and the cache, as patches; the product has no switch.

Each is a slip that somebody could make: a forgotten check, a position off by one, a list that is
appended to where it is addressed by position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ppsd.engine import first_stage, rejection, sequence
from ppsd.engine.engine import Engine
from ppsd.engine.first_stage import FirstStage
from ppsd.engine.sequence import HeldRows, Sequence
from ppsd.model import kernels
from ppsd.model.cache import KVCache
from ppsd.model.tokenizer import Tokenizer
from ppsd.speculation import policy
from ppsd.speculation.policy import Emit, Policy
from ppsd.speculation.sampling import Sampler, Stream, gumbel, uniform
from ppsd.transport.inprocess import InProcessEndpoint
from ppsd.worker.judge import Judge
from ppsd.worker.messages import Block
from ppsd.worker.slot import TokenHistory

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
BUGS: dict[str, Plant] = {}


def bug(name: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        BUGS[name] = plant
        return plant

    return register


def fails(check: Callable[[], None]) -> bool:
    """Return True if a check notices: by other tokens, or as the pipeline itself refuses.

    A planted bug that has fallen behind the code it changes is no bug that was caught.
    """
    try:
        check()
    except (TypeError, AttributeError, NameError):
        raise
    except Exception:  # any other refusal counts: a bug shows in its own way
        return True
    return False


@bug("key/value row of a rolled-back position kept")
def _(patch: Patch) -> None:
    reserve, advance = KVCache.reserve, KVCache.advance

    def remembering(self, position, rows, slot=0):
        tensors = (*self.keys, *self.values)
        kept = position < self.lengths[slot]
        self.kept = [t[slot, :, position].clone() for t in tensors] if kept else []
        reserve(self, position, rows, slot)

    def restoring(self, position, rows, slot=0):
        advance(self, position, rows, slot)
        for tensor, row in zip((*self.keys, *self.values), self.kept, strict=bool(self.kept)):
            tensor[slot, :, position] = row

    patch.setattr(KVCache, "reserve", remembering)
    patch.setattr(KVCache, "advance", restoring)


@bug("verified rows filed one position too far")
def _(patch: Patch) -> None:
    keep = FirstStage.keep

    def shifted(self, sequence, verdict):
        keep(self, sequence, verdict._replace(position=verdict.position + 1))

    patch.setattr(FirstStage, "keep", shifted)


@bug("a draft rests on a verdict that may not have come")
def _(patch: Patch) -> None:
    certain = Policy._verified

    def hasty(self, block):
        return min(certain(self, block) + 1, block - 1)

    patch.setattr(Policy, "_verified", hasty)


@bug("position one too far after a resync, gaps in the cache allowed")
def _(patch: Patch) -> None:
    feed_row = Policy._feed_row

    def shifted(self):
        feed = feed_row(self)
        off = int(self.counts.resyncs > 0)
        return feed._replace(position=feed.position + off, block=feed.block + off)

    def unchecked(self, position, rows, slot=0):
        self.lengths[slot] = position

    patch.setattr(Policy, "_feed_row", shifted)
    patch.setattr(KVCache, "reserve", unchecked)


@bug("verdict of an older epoch accepted")
def _(patch: Patch) -> None:
    take = Engine._take

    def trusting(self, answer):
        for running in self._running:
            answer = answer._replace(epoch=running.policy.epoch)
        return take(self, answer)

    patch.setattr(Engine, "_take", trusting)


@bug("stale blocks computed and their verdicts accepted")
def _(patch: Patch) -> None:
    BUGS["verdict of an older epoch accepted"](patch)
    patch.setattr(InProcessEndpoint, "epoch", lambda self, slot: 0)


@bug("noise keyed by step instead of position")
def _(patch: Patch) -> None:
    def draw(self, logits, history, stream):
        self.step = getattr(self, "step", len(history) - 1) + 1
        values = self.process(logits, history)
        if not self._params.greedy:
            values = values + gumbel(self._params.seed, self.step, self.vocab_size, stream)
        return int(values.argmax())

    patch.setattr(Sampler, "draw", draw)


@bug("penalties count rejected drafts")
def _(patch: Patch) -> None:
    def append(self, position, tokens):
        self.end = position if len(tokens) > 1 else getattr(self, "end", position)
        self.end = 0 if position == 0 else self.end
        room = len(self._tokens) - self.end
        self._ids[self.end : self.end + len(tokens)] = tokens[:room]
        self.end += len(tokens)

    patch.setattr(TokenHistory, "write", append)


def change_emits(patch: Patch, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    """Say other tokens wherever the target's own token follows accepted drafts."""
    on_verdict = Policy._on_verdict

    def changed(self, event):
        return [
            c._replace(tokens=change(c.tokens))
            if isinstance(c, Emit) and 0 < c.accepted < len(c.tokens)
            else c
            for c in on_verdict(self, event)
        ]

    patch.setattr(Policy, "_on_verdict", changed)


@bug("bonus token dropped")
def _(patch: Patch) -> None:
    change_emits(patch, lambda tokens: tokens[:-1])


@bug("bonus token said twice")
def _(patch: Patch) -> None:
    change_emits(patch, lambda tokens: (*tokens, tokens[-1]))


@bug("drafts accepted without comparing")
def _(patch: Patch) -> None:
    def trusting(drafts, targets):
        count = min(len(drafts), len(targets))
        return count, targets[count] if count < len(targets) else None

    patch.setattr(policy, "accept", trusting)


@bug("correction said but not fed")
def _(patch: Patch) -> None:
    replace_drafts = Policy._replace_drafts

    def keeping(self, position, token, missed):
        draft = self._tokens[position] if missed else token
        replace_drafts(self, position, draft, missed)

    patch.setattr(Policy, "_replace_drafts", keeping)


def overlook(patch: Patch, reason: str) -> None:
    """See the end of a request only in the last token of a verdict."""
    until_end = Policy._until_end

    def last_only(self, targets):
        cut, end = until_end(self, targets)
        return (targets, None) if end == reason and len(cut) < len(targets) else (cut, end)

    patch.setattr(Policy, "_until_end", last_only)


@bug("stop token inside an accepted run overlooked")
def _(patch: Patch) -> None:
    overlook(patch, "stop")


@bug("a pause forgets the drafts under way")
def _(patch: Patch) -> None:
    pause = Policy.pause

    def forgetting(self):
        pause(self)
        del self._tokens[self._committed :]
        self._fed = min(self._fed, self._committed)

    patch.setattr(Policy, "pause", forgetting)


@bug("a pause forgets the rows of an open block")
def _(patch: Patch) -> None:
    pause = Policy.pause

    def forgetting(self):
        pause(self)
        self._open_rows = 0

    patch.setattr(Policy, "pause", forgetting)


@bug("rows of a block shipped from the wrong offset")
def _(patch: Patch) -> None:
    def rolled(*, hidden, **rest):
        return Block(hidden=torch.roll(hidden, 1, 0), **rest)

    patch.setattr(first_stage, "Block", rolled)


@bug("one verdict copied to all rows of a block")
def _(patch: Patch) -> None:
    verdict = Judge.verdict

    def copied(self, block, hidden):
        said = verdict(self, block, hidden)
        return said._replace(tokens=said.tokens[:1] * len(said.tokens))

    patch.setattr(Judge, "verdict", copied)


@bug("rows reused beyond the common prefix")
def _(patch: Patch) -> None:
    common_prefix = sequence._common_prefix
    patch.setattr(sequence, "_common_prefix", lambda a, b: min(len(a), common_prefix(a, b) + 1))


@bug("a token that was never fed counted among the rows held")
def _(patch: Patch) -> None:
    length = Sequence.length.fget
    patch.setattr(Sequence, "length", property(lambda self: length(self) + 1))


@bug("rows kept that a broken request wrote over")
def _(patch: Patch) -> None:
    take = HeldRows.take

    def keeping(self, request, cached, *, own):
        tokens = self.tokens
        take(self, request, cached, own=own)
        self.tokens = tokens
        return cached

    patch.setattr(HeldRows, "take", keeping)


@bug("rows reused that were computed in other shapes")
def _(patch: Patch) -> None:
    overlap = HeldRows.overlap

    def everything(self, request):
        return overlap(self, replace(request, reuse=True))

    patch.setattr(HeldRows, "overlap", everything)


@bug("rows of an answer taken for whole chunks of a prompt")
def _(patch: Patch) -> None:
    keep = HeldRows.keep

    def whole(self, sequence):
        keep(self, sequence)
        self._whole = len(self.tokens)

    patch.setattr(HeldRows, "keep", whole)


@bug("the tokenizer's own end of sequence overlooked")
def _(patch: Patch) -> None:
    patch.setattr(Tokenizer, "eos_ids", ())


@bug("the residual drawn with the acceptance test's uniform")
def _(patch: Patch) -> None:
    def shared(seed, position, stream):
        return uniform(seed, position, Stream.ACCEPT if stream is Stream.RESIDUAL else stream)

    patch.setattr(rejection, "uniform", shared)


@bug("a rejected draft replaced from the target's distribution")
def _(patch: Patch) -> None:
    def careless(draft, q, p, for_accept, for_residual):
        if for_accept < p[draft] / q[draft]:
            return draft
        return min(int((p.cumsum(0) <= for_residual).sum()), len(p) - 1)

    patch.setattr(rejection, "draw_target", careless)


def choose_among_all(patch: Patch, best: Callable[[torch.Tensor, int], int]) -> None:
    """Choose by ``best`` what the compiled kernels choose where there are any."""

    def largest(rows, among):
        if rows.dtype != torch.bfloat16:
            return None
        return tuple(best(row, among) for row in rows.float())

    patch.setattr(kernels, "largest", largest)


@bug("the last of equal tokens chosen")
def _(patch: Patch) -> None:
    choose_among_all(patch, lambda row, among: among - 1 - int(row[:among].flip(0).argmax()))


@bug("the best token looked for among padded ids too")
def _(patch: Patch) -> None:
    choose_among_all(patch, lambda row, among: int(row.argmax()))


@bug("penalties overlooked where the largest logit is taken")
def _(patch: Patch) -> None:
    choose_among_all(patch, lambda row, among: int(row[:among].argmax()))
    patch.setattr(Sampler, "takes_largest", lambda self, position: self._params.greedy)


@bug("least tokens counted one short where the largest logit is taken")
def _(patch: Patch) -> None:
    takes_largest = Sampler.takes_largest
    choose_among_all(patch, lambda row, among: int(row[:among].argmax()))
    patch.setattr(Sampler, "takes_largest", lambda self, at: takes_largest(self, at + 1))
