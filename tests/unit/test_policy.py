"""The policy alone, driven by a toy pipeline whose answers come in any order a real one allows."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppsd.errors import ConfigError, ProtocolError
from ppsd.speculation.policy import (
    UNVERIFIED,
    Command,
    Drafted,
    Emit,
    Feed,
    Finish,
    Judged,
    Policy,
    Schedule,
    schedule_for,
)

VOCAB = 5


def target(prefix: list[int]) -> int:
    """The toy model: any token of the prefix decides the next one."""
    return hashlib.blake2b(bytes(prefix), digest_size=1).digest()[0] % VOCAB


def plain(prompt: list[int], max_tokens: int, stop: frozenset[int]) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(target(prompt + tokens))
        if tokens[-1] in stop:
            break
    return tokens


@dataclass
class ToyPipeline:
    """Holds the fed tokens by position; drafts and verdicts wait in queues until delivered."""

    policy: Policy
    accept_draft: list[bool]
    fed: dict[int, int] = field(default_factory=dict)
    drafts: deque[Drafted] = field(default_factory=deque)
    verdicts: deque[Judged] = field(default_factory=deque)
    emitted: list[int] = field(default_factory=list)
    accepted: int = 0
    reason: str | None = None
    most_in_flight: int = 0
    prefill_feeds: list[Feed] = field(default_factory=list)
    row_feeds: list[Feed] = field(default_factory=list)

    def carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Emit):
                self.emitted += command.tokens
                self.accepted += command.accepted
            elif isinstance(command, Finish):
                self.reason = command.reason
            else:
                self.feed(command)

    def feed(self, feed: Feed) -> None:
        assert feed.epoch == self.policy.epoch
        end = feed.position + len(feed.tokens)
        self.fed = {p: t for p, t in self.fed.items() if p < feed.position}
        assert sorted(self.fed) == list(range(feed.position)), "rows before a feed are missing"
        self.fed |= dict(enumerate(feed.tokens, start=feed.position))
        (self.prefill_feeds if len(feed.tokens) > 1 else self.row_feeds).append(feed)
        prefix = [self.fed[p] for p in range(end)]
        if feed.ship:
            first = end - feed.judge
            answers = tuple(target(prefix[: p + 1]) for p in range(first, end))
            self.verdicts.append(Judged(feed.epoch, feed.block, first + 1, answers, 1))
            live = sum(v.epoch == self.policy.epoch for v in self.verdicts)
            self.most_in_flight = max(self.most_in_flight, live)
        if feed.draft:
            right = self.accept_draft[end % len(self.accept_draft)]
            guess = target(prefix) if right else (target(prefix) + 1) % VOCAB
            self.drafts.append(Drafted(feed.epoch, end, guess))

    def deliver(self, prefer_draft: bool) -> bool:
        queue = self.drafts if self.drafts and (prefer_draft or not self.verdicts) else None
        event = queue.popleft() if queue else self.verdicts.popleft() if self.verdicts else None
        if event is None:
            return False
        self.carry_out(self.policy.on(event))
        return True


requests = st.fixed_dictionaries(
    {
        "block": st.integers(1, 4),
        "in_flight": st.integers(1, 5),
        "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        "cached": st.integers(0, 8),
        "chunk": st.integers(1, 4),
        "max_tokens": st.integers(1, 14),
        "stop": st.sets(st.integers(0, VOCAB - 1), max_size=2),
        "accept_draft": st.lists(st.booleans(), min_size=1, max_size=12),
        "order": st.lists(st.booleans(), min_size=1, max_size=40),
        "pause": st.lists(st.sampled_from([None, None, True, False]), min_size=1, max_size=9),
    }
)


@given(requests)
def test_every_schedule_and_order_emits_what_plain_decoding_emits(request: dict) -> None:
    prompt, max_tokens = request["prompt"], request["max_tokens"]
    stop, cached = frozenset(request["stop"]), min(request["cached"], len(prompt) - 1)
    policy = Policy(
        Schedule(request["block"], request["in_flight"]),
        max_tokens=max_tokens,
        stop_ids=stop,
        epoch=7,
        prefill_chunk=request["chunk"],
        prefill_in_flight=2,
    )
    pipeline = ToyPipeline(policy, request["accept_draft"])
    pipeline.fed = dict(enumerate(prompt[:cached]))
    pipeline.carry_out(policy.start(prompt, cached))
    step = 0
    while pipeline.deliver(request["order"][step % len(request["order"])]):
        step += 1
        will = request["pause"][step % len(request["pause"])]
        if will is not None:
            (policy.pause if will else policy.resume)()

    expected = plain(prompt, max_tokens, stop)
    assert pipeline.emitted == expected
    assert pipeline.reason == ("stop" if expected[-1] in stop else "length")
    assert pipeline.most_in_flight <= max(request["in_flight"], 2)
    counts = policy.counts
    assert counts.drafted == counts.judged + counts.discarded
    assert counts.accepted == pipeline.accepted
    assert counts.judged - counts.accepted == counts.resyncs
    assert all(f.position % request["chunk"] == 0 or f.position == cached
               for f in pipeline.prefill_feeds)  # fmt: skip


def finished_policy(schedule: Schedule, right: bool, tokens: int) -> ToyPipeline:
    policy = Policy(schedule, max_tokens=tokens, stop_ids=frozenset())
    pipeline = ToyPipeline(policy, [right])
    pipeline.carry_out(policy.start([1, 2, 3]))
    while pipeline.deliver(prefer_draft=True):
        pass
    return pipeline


def test_plain_decoding_never_drafts() -> None:
    assert finished_policy(Schedule(1, 1), right=True, tokens=9).policy.counts.drafted == 0


@pytest.mark.parametrize("schedule", [Schedule(1, 3), Schedule(3, 2), Schedule(4, 1)])
def test_a_paused_policy_is_plain_decoding_and_a_resumed_one_is_not(schedule: Schedule) -> None:
    policy = Policy(schedule, max_tokens=40, stop_ids=frozenset())
    pipeline = ToyPipeline(policy, [True])
    pipeline.carry_out(policy.start([1, 2, 3]))
    for _ in range(6):
        pipeline.deliver(prefer_draft=True)
    policy.pause()
    while not policy.restarted or pipeline.drafts:  # what was under way comes to its end
        pipeline.deliver(prefer_draft=True)
    drafted = policy.counts.drafted
    assert policy.counts.discarded == 0
    for _ in range(5):
        pipeline.most_in_flight = 0
        pipeline.deliver(prefer_draft=True)
        assert policy.restarted
        assert pipeline.most_in_flight == 1
    assert policy.counts.drafted == drafted
    policy.resume()
    while pipeline.deliver(prefer_draft=True):
        pass
    assert policy.counts.drafted > drafted + 10
    assert pipeline.emitted == plain([1, 2, 3], 40, frozenset())


@pytest.mark.parametrize("window", [2, 3, 4])
def test_right_drafts_follow_one_another_in_every_window(window: int) -> None:
    pipeline = finished_policy(Schedule(1, window), right=True, tokens=9)
    counts = pipeline.policy.counts
    assert (counts.drafted, counts.accepted, counts.resyncs) == (8, 8, 0)
    assert [feed.position for feed in pipeline.row_feeds] == list(range(3, 11))


def test_a_feed_names_the_newest_verdict_that_has_come_for_certain() -> None:
    """Of a row p in a chain, the verdicts up to p - w; none before the prompt's last row."""
    pipeline = finished_policy(Schedule(1, 3), right=True, tokens=6)
    assert [feed.verified for feed in pipeline.row_feeds] == [UNVERIFIED, UNVERIFIED, 2, 3, 4]
    pipeline = finished_policy(Schedule(1, 3), right=False, tokens=4)
    corrected = next(feed for feed in pipeline.row_feeds if feed.epoch > 1)
    assert corrected.verified == corrected.position - 1 == 2


def test_draft_then_verify_commits_a_block_a_round_when_all_drafts_are_right() -> None:
    pipeline = finished_policy(Schedule(4, 1), right=True, tokens=9)
    # the prompt's own verdict gives 1 token, then two rounds of 3 drafts and a bonus
    assert (pipeline.policy.counts.accepted, len(pipeline.emitted)) == (6, 9)
    assert pipeline.policy.counts.discarded == 0


def test_wrong_drafts_resync_and_are_never_counted_as_accepted() -> None:
    pipeline = finished_policy(Schedule(1, 3), right=False, tokens=6)
    counts = pipeline.policy.counts
    assert (counts.accepted, counts.resyncs, counts.judged) == (0, 5, 5)
    assert counts.discarded > 0


def test_no_token_is_drafted_that_could_not_be_emitted() -> None:
    for schedule in (Schedule(1, 4), Schedule(4, 1), Schedule(3, 2)):
        pipeline = finished_policy(schedule, right=True, tokens=2)
        assert pipeline.emitted == plain([1, 2, 3], 2, frozenset())
        assert max(pipeline.fed) == 3, schedule  # prompt 0..2, and the one token worth feeding


def test_repeated_and_stale_answers_change_nothing() -> None:
    policy = Policy(Schedule(1, 2), max_tokens=5, stop_ids=frozenset())
    policy.start([1])
    first = Judged(1, 0, 1, (4,), 1)
    policy.on(first)
    epoch = policy.epoch
    policy.on(Drafted(epoch, 2, 0))
    miss = Judged(epoch, 1, 2, (3,), 1)
    commands = policy.on(miss)
    assert policy.epoch == epoch + 1
    assert any(isinstance(c, Feed) and c.tokens == (3,) for c in commands)
    assert policy.on(miss) == []
    assert policy.on(Drafted(epoch, 3, 1)) == []


def test_a_verdict_that_answers_nothing_in_flight_is_refused() -> None:
    policy = Policy(Schedule(1, 2), max_tokens=5, stop_ids=frozenset())
    policy.start([1, 2])
    with pytest.raises(ProtocolError, match="does not answer"):
        policy.on(Judged(1, 1, 2, (0,), 1))
    with pytest.raises(ProtocolError, match="does not answer"):
        policy.on(Judged(1, 0, 3, (0,), 1))
    policy = Policy(Schedule(4, 1), max_tokens=5, stop_ids=frozenset())
    policy.start([1, 2])
    first = Judged(1, 0, 2, (0,), 1)
    policy.on(first)
    with pytest.raises(ProtocolError, match="block in flight None"):
        policy.on(first)


def test_a_draft_can_be_asked_for_until_its_verdict_has_come() -> None:
    policy = Policy(Schedule(1, 3), max_tokens=9, stop_ids=frozenset())
    policy.start([1, 2])
    policy.on(Drafted(1, 2, 3))
    policy.on(Drafted(1, 3, 4))
    assert [policy.draft_at(position) for position in range(1, 5)] == [None, 3, 4, None]
    policy.on(Judged(1, 0, 2, (3,), 1))
    assert [policy.draft_at(position) for position in range(1, 5)] == [None, None, 4, None]


def test_stop_ends_the_request_and_makes_work_in_flight_stale() -> None:
    policy = Policy(Schedule(1, 2), max_tokens=5, stop_ids=frozenset())
    policy.start([1])
    assert policy.stop("abort") == [Finish("abort")]
    assert policy.stop("abort") == []
    assert policy.epoch == 2
    assert policy.on(Judged(1, 0, 1, (4,), 1)) == []


def test_presets_are_points_of_one_schedule() -> None:
    assert schedule_for("autoregressive", 4) == Schedule(1, 1)
    assert schedule_for("draft-then-verify", 4) == Schedule(4, 1)
    assert schedule_for("ppsd", 4) == Schedule(1, 4)
    assert schedule_for("ppsd", 2, block=3) == Schedule(3, 2)
    assert schedule_for("ppsd", 4, in_flight=2) == Schedule(1, 2)


def test_pieces_of_a_prompt_have_a_window_of_their_own() -> None:
    policy = Policy(
        Schedule(1, 1), max_tokens=1, stop_ids=frozenset(), prefill_chunk=2, prefill_in_flight=3
    )
    feeds = policy.start(list(range(9)))
    assert [feed.tokens for feed in feeds if isinstance(feed, Feed)] == [(0, 1), (2, 3), (4, 5)]


def plain_policy() -> Policy:
    return Policy(Schedule(1, 1), max_tokens=1, stop_ids=frozenset())


@pytest.mark.parametrize(
    ("field_name", "value", "call"),
    [
        ("mode", "fast", lambda: schedule_for("fast", 2)),
        ("mode", "autoregressive", lambda: schedule_for("autoregressive", 2, block=2)),
        ("block", 0, lambda: Schedule(0, 1)),
        ("in_flight", 65, lambda: Schedule(1, 65)),
        ("block", True, lambda: Schedule(True, 1)),
        ("cached", 2, lambda: plain_policy().start([1, 2], 2)),
    ],
)
def test_bad_schedules_are_named(field_name: str, value: object, call) -> None:
    with pytest.raises(ConfigError, match=f"^{field_name} must") as caught:
        call()
    assert repr(value) in str(caught.value)
