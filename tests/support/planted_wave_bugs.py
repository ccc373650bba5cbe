"""Bugs to plant in waves: in trees, cells, verdicts and in what requests leave behind.

As in planted_bugs.py, each is a slip that somebody could make.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ppsd.engine.links import StageLinks
from ppsd.engine.wave_engine import WaveEngine
from ppsd.model.cache import KVCache
from ppsd.model.runners import PassesTogether
from ppsd.speculation.sampling import Sampler, gumbel
from ppsd.speculation.tree import Cells
from ppsd.speculation.waves import WavePolicy
from ppsd.transport.inprocess import InProcessEndpoint
from ppsd.worker.inner_head import InnerHead
from ppsd.worker.judge import Judge
from ppsd.worker.link import TransportLink
from ppsd.worker.loop import Worker
from ppsd.worker.messages import Refusal
from ppsd.worker.wave_messages import Wave

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
WAVE_BUGS: dict[str, Plant] = {}


def bug(name: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        WAVE_BUGS[name] = plant
        return plant

    return register


def change_part(patch: Patch, change: Callable) -> None:
    """Tell the stages something else of a sequence's share in a wave."""
    part = WavePolicy.part
    patch.setattr(WavePolicy, "part", lambda self, nodes: change(self, *part(self, nodes)))


@bug("ancestors taken from one generation before")
def _(patch: Patch) -> None:
    def shifted(policy, part, rows):
        return part, [row._replace(cells=(*row.cells[:1], *row.cells[:-1])) for row in rows]

    change_part(patch, shifted)


@bug("ancestors in the order of their cells")
def _(patch: Patch) -> None:
    def ordered(policy, part, rows):
        return part, [row._replace(cells=tuple(sorted(row.cells))) for row in rows]

    change_part(patch, ordered)


@bug("loose cell used again while its row lives")
def _(patch: Patch) -> None:
    def take(self, position):
        if position not in self._own:
            self._own.add(position)
            return position
        self._loose.insert(0, self._loose.pop())
        return self._loose[0]

    def give(self, cell):
        self._own.discard(cell)

    def keep(self, node):
        if node.cell == node.position:
            self._own.discard(node.cell)
            return None
        return node.cell, node.position

    for name, changed in (("take", take), ("give", give), ("keep", keep)):
        patch.setattr(Cells, name, changed)


@bug("the sibling's row committed")
def _(patch: Patch) -> None:
    commit = KVCache.commit

    def mistaken(self, slot, length, moves):
        commit(self, slot, length, [(to, to) for _, to in moves])

    patch.setattr(KVCache, "commit", mistaken)


@bug("moves told twice")
def _(patch: Patch) -> None:
    def twice(policy, part, rows):
        policy._moves = list(part.moves)
        return part, rows

    change_part(patch, twice)


@bug("moves never told")
def _(patch: Patch) -> None:
    change_part(patch, lambda policy, part, rows: (part._replace(moves=()), rows))


@bug("moves lost with a wave that died")
def _(patch: Patch) -> None:
    def losing(send):
        def sent(self, *arguments):
            message = arguments[-1]
            if not isinstance(message, Wave) or message.rows:
                send(self, *arguments)

        return sent

    for sender in (StageLinks, TransportLink):
        patch.setattr(sender, "send", losing(sender.send))


def judge_otherwise(patch: Patch, token: Callable) -> None:
    """Let ``token`` of (rows, found, target's token) be what follows the judged row ``found``."""
    verdicts, tokens = Judge.verdicts, Judge._tokens

    def judging(self, rows, *rest):
        self.rows = rows
        said = verdicts(self, rows, *rest)
        self.rows = None
        return said

    def changed(self, slot, logits, first, masks):
        target = tokens(self, slot, logits, first, masks)
        if getattr(self, "rows", None) is None:
            return target
        return (token(self, slot, first, target[0]),)

    patch.setattr(Judge, "verdicts", judging)
    patch.setattr(Judge, "_tokens", changed)


@bug("a draft said instead of the target's token")
def _(patch: Patch) -> None:
    def drafted(judge, slot, first, target):
        index = judge._slots.index(slot)
        row = next((r for r in judge.rows if (r.slot, r.position) == (index, first)), None)
        return target if row is None else row.token

    judge_otherwise(patch, drafted)


@bug("dead row judged")
def _(patch: Patch) -> None:
    may_follow = Judge.may_follow

    def trusting(self, rows):
        for row in rows:
            slot = self._slots[row.slot]
            if row.parent == slot.node:
                slot.token = row.token
        return may_follow(self, rows)

    patch.setattr(Judge, "may_follow", trusting)


@bug("rows under the root dropped with dead ones")
def _(patch: Patch) -> None:
    def only_first(self, rows):
        return [
            i
            for i, row in enumerate(rows)
            if (row.parent, row.token) == (self._slots[row.slot].node, self._slots[row.slot].token)
        ]

    patch.setattr(Judge, "may_follow", only_first)


@bug("noise keyed by the place in the wave")
def _(patch: Patch) -> None:
    verdicts, draw = Judge.verdicts, Sampler.draw

    def judging(self, *arguments):
        for slot in self._slots:
            if slot.sampler is not None:
                slot.sampler.place = 0
        said = verdicts(self, *arguments)
        for slot in self._slots:
            if slot.sampler is not None:
                slot.sampler.place = None
        return said

    def by_place(self, logits, history, stream):
        place = getattr(self, "place", None)
        if place is None or self._params.greedy:
            return draw(self, logits, history, stream)
        self.place += 1
        noise = gumbel(self._params.seed, place, self.vocab_size, stream)
        return int((self.process(logits, history) + noise).argmax())

    patch.setattr(Judge, "verdicts", judging)
    patch.setattr(Sampler, "draw", by_place)


@bug("verdicts of two sequences swapped")
def _(patch: Patch) -> None:
    verdicts = Judge.verdicts

    def swapped(self, *arguments):
        said, *refusals = verdicts(self, *arguments) or [None]
        if said is None or isinstance(said, Refusal):
            return [said, *refusals] if said else []
        several = len({slot for slot, _ in said.nodes}) > 1
        return [said._replace(tokens=said.tokens[::-1]) if several else said, *refusals]

    patch.setattr(Judge, "verdicts", swapped)


@bug("a row lives by another slot's epoch")
def _(patch: Patch) -> None:
    epoch = InProcessEndpoint.epoch
    patch.setattr(InProcessEndpoint, "epoch", lambda self, slot: epoch(self, 0))


@bug("node ids of a request that is over used again")
def _(patch: Patch) -> None:
    finish = WavePolicy._finish
    first = "first_epoch"

    def forgetting(self, reason):
        said = finish(self, reason)
        self.epoch = getattr(self, first)
        return said

    start = WavePolicy.start

    def starting(self, prompt, cached=0):
        setattr(self, first, self.epoch)
        return start(self, prompt, cached)

    patch.setattr(WavePolicy, "_finish", forgetting)
    patch.setattr(WavePolicy, "start", starting)


@bug("tokens of a shared prompt unknown to the judge")
def _(patch: Patch) -> None:
    patch.setattr(Judge, "begin", lambda self, begin: self._slot(begin.slot).begin(begin))


@bug("shared rows declared but not copied")
def _(patch: Patch) -> None:
    def declaring(self, begin):
        self._stage.commit(begin.slot, begin.shared, ())

    patch.setattr(Worker, "_share", declaring)


@bug("rows of a paused tree run as one stretch in the head")
def _(patch: Patch) -> None:
    def lag(self, rows, hidden):
        for row, own in zip(rows, torch.split(hidden, 1), strict=True):
            self._lagging.setdefault(row.slot, []).append((row, own))

    patch.setattr(InnerHead, "lag", lag)


@bug("rows held counted before the stages had moved them")
def _(patch: Patch) -> None:
    advance = WavePolicy._advance

    def hasty(self, token):
        said = advance(self, token)
        self.held = self.tree.root.position
        return said

    patch.setattr(WavePolicy, "_advance", hasty)


@bug("verdicts on a former root taken")
def _(patch: Patch) -> None:
    commit = WavePolicy._commit

    def trusting(self, nodes, tokens):
        return commit(self, (self.tree.root.id, *nodes[1:]), tokens)

    def unchecked(self, verdicts):
        for (slot, node), token in zip(verdicts.nodes, verdicts.tokens, strict=True):
            if (sequence := self._slots.get(slot)) is not None:
                self._obey(sequence, sequence.waves._commit((node,), (token,)))

    patch.setattr(WavePolicy, "_commit", trusting)
    patch.setattr(WaveEngine, "_verify", unchecked)


@bug("opinion of an old root taken for the new one's")
def _(patch: Patch) -> None:
    hear = WavePolicy.hear

    def trusting(self, node, *said):
        hear(self, node if node in self.tree.nodes else self.tree.root.id, *said)

    patch.setattr(WavePolicy, "hear", trusting)


@bug("rows of a piece of a prompt taken for the wave's")
def _(patch: Patch) -> None:
    def swapped(self):
        return torch.cat([part.hidden for part in reversed(self._passes)])

    patch.setattr(PassesTogether, "hidden", property(swapped))


@bug("a piece of a prompt lost with the wave that it joins")
def _(patch: Patch) -> None:
    joined = Worker._joined

    def losing(self, wave):
        block = joined(self, wave) if wave.rows else None
        self.joining = None
        return block

    patch.setattr(Worker, "_joined", losing)
