"""The wave policy by itself: what goes into a wave, in which order, and what is never looked at."""

from __future__ import annotations

import pytest

from ppsd.errors import ConfigError, ProtocolError
from ppsd.speculation.lookup import LENGTHS
from ppsd.speculation.masks import Masks
from ppsd.speculation.policy import Emit, Judged
from ppsd.speculation.tree import Cells, Node
from ppsd.speculation.waves import Verified, WavePolicy, choose

ODDS = [0.0] * len(LENGTHS)
PROMPT = [5, 6, 7]


def policy(
    slot: int = 0,
    *,
    prompt: list[int] = PROMPT,
    chunk: int = 8,
    loose: int = 8,
    lookup: bool = False,
    depth: int = 4,
    max_tokens: int = 20,
    masks: Masks | None = None,
) -> WavePolicy:
    made = WavePolicy(
        slot,
        depth,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
        cells=Cells(64, loose),
        lookup=lookup,
        prefill_chunk=chunk,
        masks=masks,
    )
    made.start(prompt)
    return made


def decoding(slot: int = 0, token: int = 1, **settings) -> WavePolicy:
    """Return a policy whose prompt has been answered with ``token``."""
    made = policy(slot, **settings)
    feed = made.chunk(1)
    assert feed is not None
    length = len(settings.get("prompt", PROMPT))
    assert made.on(Judged(feed.epoch, 0, length, (token,), 1)) == [Emit((token,), 0)]
    return made


def test_what_a_head_says_is_mixed_with_a_copy() -> None:
    """7 followed 5 and 6 before; by odds of 1 to 1 it has half of the probability."""
    for lookup, expected in ((True, 7), (False, 2)):
        made = decoding(prompt=[5, 6, 7, 5], token=6, lookup=lookup)
        choose([made], 1, 2)
        say(made, made.tree.root.id, {2: 0.6, 3: 0.3})
        assert tokens(choose([made], 1, 3)) == [(0, expected)]


def tokens(chosen: list[tuple[WavePolicy, Node]]) -> list[tuple[int, int]]:
    return [(made.slot, node.token) for made, node in chosen]


def say(made: WavePolicy, node: int, candidates: dict[int, float], level: int = 0) -> None:
    made.hear(node, level, list(candidates), [*candidates.values(), *ODDS])


def check_opinions() -> None:
    """Let opinions of nodes that are no more change nothing, and deeper ones decide."""
    made = decoding()
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {2: 0.6, 3: 0.3})
    choose([made], 2, 3)
    say(made, root.id, {3: 0.9}, level=1)
    say(made, root.id, {4: 0.9}, level=1)
    assert (made.certain(), made.offers(9, 0)) == (False, [])
    made.on(Verified((root.id,), (9,)))
    say(made, root.id, {8: 0.9}, level=3)
    (_, new), *rest = choose([made], 4, 4)
    assert (new.token, rest) == (9, [])
    say(made, 10**6, {8: 0.9}, level=3)
    assert (made.certain(), made.offers(9, 0)) == (False, [])
    assert made.counts.opinions == 2, "of live nodes, from later heads"


def test_opinions_of_dead_nodes_mean_nothing() -> None:
    check_opinions()


def test_a_node_never_has_the_number_of_one_that_died() -> None:
    made = decoding()
    seen = set()
    for wave in range(2, 6):
        (_, root), *_ = choose([made], 1, 2 * wave)
        say(made, root.id, {4: 0.5, 5: 0.3})
        numbers = {root.id, *(node.id for _, node in choose([made], 2, 2 * wave + 1))}
        assert len(numbers) == 3
        assert not seen & numbers
        seen |= numbers
        made.on(Verified((root.id,), (6,)))


def test_certain_rows_come_first_and_are_not_counted() -> None:
    made = [decoding(0), decoding(1, 2), decoding(2, 3)]
    roots = choose(made, 2, 2)
    assert tokens(roots) == [(0, 1), (1, 2), (2, 3)]
    for owner, root in roots:
        say(owner, root.id, {4: 0.5 + 0.1 * owner.slot, 5: 0.2})
    made[0].on(Verified((roots[0][1].id,), (6,)))
    assert tokens(choose(made, 3, 3)) == [(0, 6), (2, 4), (1, 4)]


def test_no_rows_are_plain_decoding() -> None:
    made = decoding()
    (_, root), *rest = choose([made], 0, 2)
    assert rest == []
    say(made, root.id, {4: 0.9})
    assert choose([made], 0, 3) == []


def test_a_paused_policy_feeds_roots_only() -> None:
    made = decoding()
    made.pause()
    (_, root), *rest = choose([made], 8, 2)
    assert rest == []
    say(made, root.id, {4: 0.9})
    assert choose([made], 8, 3) == []
    made.resume()
    assert tokens(choose([made], 8, 3)) == [(0, 4)]


def test_counts_tell_what_was_fed_and_how_often_each_probability_was_right() -> None:
    made = decoding()
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {4: 0.95, 5: 0.04})
    assert tokens(choose([made], 2, 3)) == [(0, 4), (0, 5)]
    assert made.counts.rows == 3
    made.on(Verified((root.id,), (4,)))
    assert made.counts.stated == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert made.counts.right == [0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    say(made, made.tree.root.id, {6: 1.0})
    assert tokens(choose([made], 1, 4)) == [(0, 6)]
    made.on(Verified((made.tree.root.id,), (6,)))
    assert made.counts.right == [0, 0, 0, 0, 0, 0, 0, 0, 0, 2], "certainty is the last tenth"


def test_a_request_that_is_over_ends_once() -> None:
    made = decoding()
    before = made.epoch
    assert len(made.stop("abort")) == 1
    assert made.epoch > before, "its rows are old from now on"
    assert made.stop("abort") == []


def test_rows_beyond_the_measured_ones_are_taken_to_be_free() -> None:
    made = decoding()
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {4: 0.5, 5: 0.3, 6: 0.15})
    assert tokens(choose([made], 8, 3, (1.0, 1.5))) == [(0, 4), (0, 5), (0, 6)]


@pytest.mark.parametrize("unit", [1.0, 1e-3])
def test_drafts_stop_where_they_no_longer_pay(unit: float) -> None:
    """In whatever unit costs are."""
    made = decoding()
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {4: 0.5, 5: 0.3, 6: 0.15})
    assert tokens(choose([made], 8, 3, (unit, 1.5 * unit, 3 * unit))) == [(0, 4), (0, 5)]


def test_no_cell_no_row() -> None:
    made = decoding(loose=1)
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {4: 0.5, 5: 0.3, 6: 0.15})
    assert tokens(choose([made], 8, 3)) == [(0, 4), (0, 5)]


def test_chunks_end_at_multiples_and_rows_wait_for_the_prompt() -> None:
    made = policy(prompt=list(range(10)), chunk=4)
    feeds = [made.chunk(wave) for wave in (1, 2, 3)]
    assert [len(feed.tokens) for feed in feeds] == [4, 4, 2]
    assert [feed.judge for feed in feeds] == [0, 0, 1]
    assert [feed.draft for feed in feeds] == [False, False, True]
    assert (made.chunk(4), made.offers(9, 0), set(made.waves)) == (None, [], {1, 2, 3})
    with pytest.raises(ProtocolError, match="does not answer the oldest block"):
        made.on(Judged(made.epoch, 4, 8, (), 1))


def test_moves_are_told_once_and_before_rows_above_them() -> None:
    made = decoding()
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {4: 0.5, 5: 0.3})
    siblings = [node for _, node in choose([made], 2, 3)]
    made.part(siblings)
    assert made.on(Verified((root.id, siblings[1].id), (5, 6))) == [Emit((5, 6), 1)]
    (_, new), *_ = choose([made], 1, 4)
    part, rows = made.part([new])
    assert part.moves == ((siblings[1].cell, siblings[1].position),)
    assert (part.length, rows[0].cells, rows[0].parent) == (5, (), siblings[1].id)
    say(made, new.id, {1: 0.9})
    (_, child), *_ = choose([made], 1, 5)
    assert made.part([child])[0].moves == ()


def test_copies_in_a_wave_are_worth_less_the_deeper_they_are() -> None:
    made = decoding(prompt=[5, 6, 7, 8, 9, 5], token=6, lookup=True)
    made.feed(None, 2)
    values = []
    for _ in range(3):
        value, *_, parent = min(made.offers(2, 0))
        made.feed(parent, 2)
        values.append(-value)
    assert 1 > values[0] > values[1] > values[2] > 0


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_draft_is_worth_the_waves_that_it_saves(depth: int) -> None:
    """As many as its parent is short of a verdict, but one; 1 behind a row of the wave before."""
    made = decoding(depth=depth)
    made.feed(None, 2)
    say(made, made.tree.root.id, {4: 0.5})
    made.tree.settle(made.tree.root)
    values = []
    for wave in range(2, 3 + depth):
        (offer,) = made.offers(wave, 0)
        values.append(-2 * offer[0])
    saved = [max(1, depth - age) / (depth - 1) for age in range(depth + 1)]
    assert values == pytest.approx(saved)
    assert values[1] == 1.0


def test_a_row_fed_a_moment_ago_has_the_value_it_has_when_all_are_looked_at() -> None:
    made = decoding(prompt=[5, 6, 7, 8, 9, 5], token=6, lookup=True)
    nodes = [node for _, node in choose([made], 3, 2)]
    assert [node.token for node in nodes] == [6, 7, 8]
    at_once = made.tree.offer(nodes[-1], 0)
    assert at_once is not None
    assert made.offers(2, 0) == [at_once]


@pytest.mark.parametrize(("max_tokens", "drafted"), [(1, []), (2, [7]), (9, [7, 8])])
def test_no_row_is_fed_that_asks_for_a_token_beyond_the_last(
    max_tokens: int, drafted: list[int]
) -> None:
    """Not even behind a prompt that waits for its verdict: a position's own cell must exist."""
    made = policy(prompt=[5, 6, 7, 8, 9, 5, 6], lookup=True, max_tokens=max_tokens)
    assert made.chunk(1) is not None
    assert [node.token for _, node in choose([made], 2, 2)] == drafted


def test_the_mask_of_a_row_is_that_of_the_answer_it_ends() -> None:
    made = decoding(
        prompt=[5, 6, 7, 8, 9, 5],
        token=6,
        lookup=True,
        masks=lambda answer: b"\xff" * 4 + bytes(answer),
    )
    nodes = [node for _, node in choose([made], 3, 2)]
    answers = [mask and [*mask[4:]] for mask in made.masks(nodes)]
    assert answers == [[6], [6, 7], [6, 7, 8]]


def test_what_a_mask_forbids_is_no_candidate() -> None:
    made = decoding(masks=lambda answer: bytes([0b1000]))
    (_, root), *_ = choose([made], 1, 2)
    say(made, root.id, {2: 0.6, 3: 0.3})
    assert tokens(choose([made], 8, 3)) == [(0, 3)]


def test_behind_another_token_than_the_copied_one_another_copy_waits() -> None:
    made = decoding(prompt=[5, 6, 7, 8, 9, 5], token=6, lookup=True)
    (_, root), *_ = choose([made], 1, 2)
    made.hear(root.id, 0, [9], [0.95, *([-40.0] * len(LENGTHS))])
    assert tokens(choose([made], 2, 3)) == [(0, 9), (0, 5)], "as behind the 9 of the prompt"


def test_the_last_token_of_a_prompt_is_always_fed() -> None:
    made = policy()
    made.start(PROMPT, 2)
    with pytest.raises(ConfigError, match=r"cached must be in \[0, 2\] for this prompt"):
        made.start(PROMPT, 3)


def test_nothing_follows_a_root_that_is_not_fed() -> None:
    made = decoding(prompt=[5, 6, 7, 8, 9, 5], token=6, lookup=True)
    assert (made.certain(), made.offers(2, 0)) == (True, [])
