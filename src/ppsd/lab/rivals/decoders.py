"""Rivals' decoding: draft, verify, take what agrees; greedy, and plain decoding's tokens always."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from ppsd.lab.rivals.chain import Chain
from ppsd.lab.rivals.dynamic import PROMPT_ROWS, DynamicExit, Shadow
from ppsd.lab.rivals.jobs import Job, Reply
from ppsd.lab.rivals.skips import LEAST_CHANCE, MOST_DRAFTS, SkipSets, odd_layers
from ppsd.lab.rivals.stage import agreed
from ppsd.speculation.lookup import Match, find

Took = Callable[[Sequence[int]], object]


@dataclass
class Text:
    """A request's tokens, and the last layer's newest verified row once there is one.

    ``first`` are the replies to the end of the prompt.
    """

    tokens: list[int]
    prompt: int
    verified: torch.Tensor | None = None
    mean: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    first: list[Reply] = field(default_factory=list)

    def match(self, drafts: Sequence[int] = ()) -> Match | None:
        """Return the longest repetition of the end of the text and drafts behind it."""
        return find(torch.tensor([*self.tokens, *drafts]))


class Drafting(Protocol):
    """A way to draft.

    ``lookup``: heads are mixed with what followed the same tokens before. ``shadows``:
    verifications are to say what every exit would have drafted.
    """

    exits: tuple[int, ...]
    heads: dict[int, str]
    lookup: bool
    shadows: bool

    def begin(self, text: Text) -> None:
        """Begin with a request whose prompt has been run."""

    def drafts(self, chain: Chain, text: Text, most: int) -> tuple[int, list[int]]:
        """Draft at most so many tokens behind a text; return them, and the exit they came from.

        Without an exit a verification runs all layers anew.
        """

    def learn(self, shadows: dict[int, list[Shadow]], truth: Sequence[int]) -> None:
        """Take what a verification said, up to the first draft that was wrong."""


class Dynamic:
    """DEL over the model's own exits, or over heads; ``costs`` as in DynamicExit."""

    shadows = True

    def __init__(
        self, costs: dict[int, float], whole: float, heads: dict[int, str], *, lookup: bool
    ) -> None:
        self.exits, self.heads, self.lookup = tuple(costs), heads, lookup
        self._made = costs, whole
        self._state = DynamicExit(costs, whole)

    def begin(self, text: Text) -> None:
        self._state = DynamicExit(*self._made)
        truth = max((reply.tokens for reply in text.first), key=len)
        self._state.fill(_shadows(text.first), truth)

    def drafts(self, chain: Chain, text: Text, most: int) -> tuple[int, list[int]]:
        state, drafts = self._state, list[int]()
        while len(drafts) < min(state.length, most):
            token, confidence = draft(chain, text, drafts, state.exit, lookup=self.lookup)
            drafts.append(token)
            if confidence < state.threshold:
                break
        return state.exit, drafts

    def learn(self, shadows: dict[int, list[Shadow]], truth: Sequence[int]) -> None:
        self._state.update(shadows, truth)


class Fixed:
    """Draft-then-verify: always the same head, and always as many drafts."""

    shadows = False

    def __init__(self, exit_layer: int, head: str, length: int, *, lookup: bool) -> None:
        self.lookup = lookup
        self.exits: tuple[int, ...] = (exit_layer,)
        self.heads = {exit_layer: head}
        self._length = length

    def begin(self, text: Text) -> None:
        """Need nothing."""

    def drafts(self, chain: Chain, text: Text, most: int) -> tuple[int, list[int]]:
        (exit_layer,), drafts = self.exits, list[int]()
        while len(drafts) < min(self._length, most):
            drafts.append(draft(chain, text, drafts, exit_layer, lookup=self.lookup)[0])
        return exit_layer, drafts

    def learn(self, shadows: dict[int, list[Shadow]], truth: Sequence[int]) -> None:
        """Need nothing."""


class Skipping:
    """KNN-SSD: drafts by the model without the sub-layers that suit the prompt.

    Without ``sets`` every task is unknown. ``skip`` is the request's own set.
    """

    exits: tuple[int, ...] = ()
    lookup = shadows = False

    def __init__(self, layers: int, sets: SkipSets | None) -> None:
        self.heads: dict[int, str] = {}
        self.skip = odd_layers(layers)
        self._layers = layers
        self._sets = sets

    def begin(self, text: Text) -> None:
        if self._sets is not None:
            _, self.skip = self._sets.nearest(text.mean.float().cpu().numpy())

    def drafts(self, chain: Chain, text: Text, most: int) -> tuple[int, list[int]]:
        drafts = list[int]()
        while len(drafts) < min(MOST_DRAFTS, most):
            token, chance = draft(chain, text, drafts, self._layers, skip=self.skip)
            drafts.append(token)
            if chance < LEAST_CHANCE:
                break
        return 0, drafts

    def learn(self, shadows: dict[int, list[Shadow]], truth: Sequence[int]) -> None:
        """Need nothing."""


def draft(
    chain: Chain,
    text: Text,
    drafts: Sequence[int],
    exit_layer: int,
    *,
    skip: tuple[int, ...] = (),
    lookup: bool = False,
) -> Shadow:
    """Return the token behind a text and the drafts so far, and its probability."""
    known = [*text.tokens, *drafts]
    job = Job(
        "draft",
        len(known) - 1,
        (known[-1],),
        exit=exit_layer,
        skip=skip,
        matches=(text.match(drafts) if lookup else None,),
        verified=text.verified,
    )
    (reply,) = chain.ask(job)
    return reply.tokens[0], reply.confidences[0]


@dataclass
class Decoded:
    """A decoded request; times by rank 0's clock, counts as those of our own policies."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)
    first_seconds: float = 0.0
    seconds: float = 0.0
    rounds: int = 0
    drafted: int = 0
    judged: int = 0
    resyncs: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts by the names that all benchmarks use."""
        accepted = sum(self.accepted)
        return {
            "drafted": self.drafted,
            "judged": self.judged,
            "accepted": accepted,
            "discarded": self.drafted - accepted,
            "resyncs": self.resyncs,
        }


@dataclass(frozen=True)
class Ends:
    """When an answer is over."""

    max_tokens: int
    stop_ids: frozenset[int]


def begin(chain: Chain, drafting: Drafting, prompt: Sequence[int], piece: int) -> Text:
    """Run a prompt through the stages; the text that is returned has the first token.

    It is cut into pieces as plain decoding cuts it: others may give other bits.
    """
    chain.ask(Job("setup", exits=drafting.exits, heads=drafting.heads))
    count = min(PROMPT_ROWS, len(prompt)) if drafting.shadows else 0
    matches: tuple[Match | None, ...] = (None,) * count
    if drafting.lookup and count:
        ends = range(len(prompt) - count + 1, len(prompt) + 1)
        matches = tuple(find(torch.tensor(prompt[:end])) for end in ends)
    replies: list[Reply] = []
    for position in range(0, len(prompt), piece):
        chunk = tuple(prompt[position : position + piece])
        last = position + len(chunk) == len(prompt)
        asked = Job("prompt", position, chunk, last=last, shadows=count, matches=matches)
        replies = chain.ask(asked)
    said = next(reply for reply in replies if reply.rows is not None)
    assert said.rows is not None
    mean, newest = said.rows[0], said.rows[1:]
    return Text([*prompt, said.tokens[-1]], len(prompt), newest, mean, replies)


def decode(
    chain: Chain,
    drafting: Drafting,
    text: Text,
    ends: Ends,
    took: Took = lambda tokens: None,
) -> Decoded:
    """Go on with a text until its end; ``took`` hears of tokens as they become final."""
    done, text = Decoded(), replace(text, tokens=list(text.tokens))
    _take(done, text.tokens[text.prompt :], 0, ends, took)
    drafting.begin(text)
    start = chain.now()
    while len(done.tokens) < ends.max_tokens and done.tokens[-1] not in ends.stop_ids:
        most = ends.max_tokens - len(done.tokens) - 1
        exit_layer, drafts = drafting.drafts(chain, text, most)
        replies = _verify(chain, drafting, text, drafts, exit_layer)
        said = next(reply for reply in replies if reply.tokens)
        right = agreed(drafts, said.tokens)
        new = said.tokens[: right + 1]
        drafting.learn(_shadows(replies), new)
        text.tokens += new
        text.verified = said.rows
        done.rounds += 1
        done.drafted += len(drafts)
        done.judged += min(right + 1, len(drafts))
        done.resyncs += right < len(drafts)
        _take(done, new, right, ends, took)
    done.seconds = chain.now() - start
    return done


def _verify(
    chain: Chain, drafting: Drafting, text: Text, drafts: Sequence[int], exit_layer: int
) -> list[Reply]:
    """Ask for the target's tokens behind a text and each of its drafts."""
    count = len(drafts) + 1
    matches: tuple[Match | None, ...] = (None,) * count
    if drafting.shadows and drafting.lookup:
        matches = tuple(text.match(drafts[:i]) for i in range(count))
    job = Job(
        "verify",
        len(text.tokens) - 1,
        (text.tokens[-1], *drafts),
        exit=exit_layer if drafts else 0,
        shadows=count if drafting.shadows else 0,
        matches=matches,
        verified=text.verified,
    )
    return chain.ask(job)


def _take(
    done: Decoded,
    tokens: Sequence[int],
    right: int,
    ends: Ends,
    took: Took,
) -> None:
    """Make tokens final up to the answer's end; the first ``right`` of them were drafts."""
    for at, token in enumerate(tokens):
        if token in ends.stop_ids:
            tokens = tokens[: at + 1]
            break
    done.tokens += tokens
    done.accepted += [i < right for i in range(len(tokens))]
    took(tokens)


def _shadows(replies: Sequence[Reply]) -> dict[int, list[Shadow]]:
    return {e: said for reply in replies for e, said in reply.shadows.items()}
