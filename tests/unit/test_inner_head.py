"""When a head runs rows that may wait: before what rests on them, and never for another request."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ppsd.lab.clocks import Clock
from ppsd.lab.emulated import EmulatedHead
from ppsd.model.exit_head import most_probable
from ppsd.model.passes import Place
from ppsd.speculation.masks import permits
from ppsd.speculation.sampling import gumbel
from ppsd.speculation.waves import Row
from ppsd.types import SamplingParams
from ppsd.worker.inner_head import MAX_LAG_ROWS, InnerHead
from ppsd.worker.messages import Begin, Block


class Noted:
    """A head that notes where rows are run."""

    def __init__(self) -> None:
        self.run: list[tuple[int, int]] = []  # position, rows
        self.placed: list[list[Place]] = []  # rows of trees
        self.committed: list[tuple[int, int, object]] = []

    def begin(self, slot: int, prompt: tuple[int, ...]) -> None:
        pass

    def forward(self, hidden: torch.Tensor, position: int, slot: int) -> torch.Tensor:
        self.run.append((position, len(hidden)))
        return hidden

    def forward_rows(self, hidden: torch.Tensor, places: list[Place]) -> torch.Tensor:
        self.placed.append(places)
        return hidden

    def commit(self, slot: int, length: int, moves: object) -> None:
        self.committed.append((slot, length, moves))

    def share(self, source: int, slot: int, length: int) -> None:
        pass


def certain(position: int) -> Row:
    return Row(0, position, position - 1, position, 1, position, (), ())


def begin(shared: int) -> Begin:
    return Begin(0, SamplingParams(), 4, (), 9, shared=shared)


def lagging(rows: int) -> tuple[InnerHead, Noted]:
    noted = Noted()
    head = InnerHead(noted)  # type: ignore[arg-type]  # acts as a head
    for position in range(10, 10 + rows):
        head.commit(0, position, ())
        head.lag([certain(position)], torch.zeros(1, 2))
    return head, noted


@pytest.mark.parametrize(("shared", "expected"), [(0, [(0, 4)]), (8, [(10, 3), (0, 4)])])
def test_rows_that_wait_are_void_once_nothing_is_taken_over(shared, expected) -> None:
    head, noted = lagging(3)
    head.begin(begin(shared))
    head.observe(0, Block(0, 1, 0, -1, 0, (1,) * 4, torch.zeros(4, 2)), torch.zeros(4, 2))
    assert noted.run == expected


def test_a_single_row_that_waits_is_void_too() -> None:
    head, noted = lagging(1)
    head.begin(begin(0))
    head.observe(0, Block(0, 1, 0, -1, 0, (1,) * 4, torch.zeros(4, 2)), torch.zeros(4, 2))
    assert noted.run == [(0, 4)]


def test_rows_of_another_slot_still_count_when_a_request_begins_anew() -> None:
    head, noted = lagging(3)
    head.begin(replace(begin(0), slot=1))
    head.observe(0, Block(1, 1, 0, -1, 0, (1,) * 4, torch.zeros(4, 2)), torch.zeros(4, 2))
    assert noted.run == [(10, 3), (0, 4)]


@pytest.mark.parametrize("part", [(0, 13, ((70, 12),)), (0, 12, ())], ids=str)
def test_rows_that_wait_run_before_the_cache_is_changed(part) -> None:
    head, noted = lagging(3)
    noted.committed.clear()
    head.commit(0, 13, ())  # as far as the rows go that wait: they make it true themselves
    assert (noted.run, noted.committed) == ([], [])
    head.commit(1, 13, ())
    assert (noted.run, noted.committed) == ([], [(1, 13, ())]), "nothing of that slot waits"
    head.commit(*part)
    assert (noted.run, noted.committed[1:]) == ([(10, 3)], [part])


@pytest.mark.parametrize(
    "rows",
    [
        [certain(12), certain(13)],
        [certain(12)._replace(cell=70)],
        [certain(12)._replace(cells=(70,))],
    ],
    ids=["two", "in a loose cell", "below one"],
)
def test_what_is_not_certain_alone_runs_at_once(rows) -> None:
    head, noted = lagging(2)
    head.lag(rows, torch.zeros(len(rows), 2))
    assert noted.run == [(10, 2)]
    assert noted.placed == [[Place(r.slot, r.position, r.cell, r.cells) for r in rows]]


def test_rows_that_do_not_follow_one_another_do_not_wait_together() -> None:
    head, noted = lagging(2)
    head.lag([certain(13)], torch.zeros(1, 2))
    assert (noted.run, noted.placed) == ([(10, 2)], [])
    head.lag([certain(14)], torch.zeros(1, 2))
    assert noted.run == [(10, 2)], "a row that follows the new one waits with it"


def test_rows_of_several_slots_wait_for_one_pass() -> None:
    head, noted = lagging(1)
    noted.committed.clear()
    for position in (11, 12):
        head.lag([certain(position), certain(position + 9)._replace(slot=1)], torch.zeros(2, 2))
    head.commit(0, 13, ())
    head.commit(1, 22, ())
    assert (noted.run, noted.placed, noted.committed) == ([], [], [])
    head.share(0, 2, 5)
    own = [Place(0, at, at, tuple(range(10, at))) for at in (10, 11, 12)]
    assert noted.placed == [[*own, Place(1, 20, 20, ()), Place(1, 21, 21, (20,))]]
    assert noted.committed == [(0, 13, ()), (1, 22, ())]


def test_certain_rows_run_together() -> None:
    _, noted = lagging(MAX_LAG_ROWS)
    assert noted.run == []
    _, noted = lagging(MAX_LAG_ROWS + 1)
    assert noted.run == [(10, MAX_LAG_ROWS)]


class Certain(Noted):
    """A head whose row i is likeliest to be followed by token i, then by lower ids."""

    ids = np.array([1, 3, 4, 9, 10])
    spec = SimpleNamespace(vocab_size=11)
    scores = torch.arange(5.0)

    def finish(self, rows: torch.Tensor, verified: object) -> torch.Tensor:
        self.verified = verified
        return rows

    def copy_odds(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.full((len(rows), 1), 0.25)

    def opinions(self, rows: torch.Tensor, k: int, slots: list[int], perturb):
        scores = perturb(self.scores.expand(len(rows), -1), [self.ids] * len(rows))
        columns, probabilities = most_probable(scores, 2)
        return torch.from_numpy(self.ids)[columns], probabilities


def speaking(head: Certain | None = None, seconds: float = 0.0) -> InnerHead:
    head = head or Certain()
    return InnerHead(head, seconds)  # type: ignore[arg-type]  # all of a head that it asks for


def allowed(*tokens: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(4, "little")


def test_a_head_names_only_what_the_grammar_permits() -> None:
    head = speaking()
    masks = (allowed(1, 3, 5), allowed(*range(32)), allowed(5))
    rows = [certain(position) for position in (10, 11, 12)]
    said = head.opinion(0, rows, torch.zeros(3, 2), masks=masks)
    assert said.tokens == ((3, 1), (10, 9), (10, 9))  # the last could say nothing at all
    assert said.numbers[0, :2].sum() == pytest.approx(1.0)  # all probability is on these two
    free = head.opinion(0, rows, torch.zeros(3, 2))
    assert free.tokens == ((10, 9),) * 3
    assert free.numbers[:, -1].tolist() == [0.25] * 3  # of copies


def test_a_prompts_last_row_is_asked_for_where_it_is_judged() -> None:
    head = speaking()
    hidden = torch.zeros(3, 2)
    masks = (allowed(4, 9), allowed(9, 10), allowed(1, 3))
    block = Block(2, 7, 4, 3, 3, (1, 2, 3), hidden, masks)
    said = head.observe(1, block, hidden)
    assert said is not None
    assert (said.source, said.nodes, said.tokens) == (1, ((2, 7),), ((3, 1),))
    assert head.observe(1, block._replace(judge=0), hidden) is None


def test_feedback_goes_to_the_head() -> None:
    certain_head = Certain()
    verified = torch.ones(1, 2)
    speaking(certain_head).opinion(0, [certain(10)], torch.zeros(1, 2), verified)
    assert certain_head.verified is verified


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_of_a_sampled_request_have_the_targets_noise(monkeypatch, dtype) -> None:
    """Each row that of the position it asks about; a greedy neighbour's scores stay."""
    monkeypatch.setattr(Certain, "scores", torch.arange(5.0, dtype=dtype))
    params = SamplingParams(temperature=9.0, seed=5)
    head = speaking()
    head.begin(Begin(0, params, 4, (), 11))
    head.begin(Begin(1, SamplingParams(temperature=0.0), 4, (), 11))
    rows = [*map(certain, range(10, 16)), certain(10)._replace(slot=1)]
    said = head.opinion(0, rows, torch.zeros(7, 2))
    expected = [likeliest(params, position) for position in range(11, 17)]
    assert said.tokens == (*(tokens for tokens, _ in expected), (10, 9))
    shares = [share for _, shares in expected for share in shares]  # in single precision
    assert said.numbers[:6, :2].flatten().tolist() == pytest.approx(shares, rel=1e-5)
    hidden = torch.zeros(4, 2)
    first = head.observe(0, Block(0, 1, 0, -1, 1, (1,) * 4, hidden), hidden)
    assert first is not None
    assert first.tokens == (likeliest(params, 4)[0],)


def likeliest(params: SamplingParams, position: int) -> tuple[tuple[int, ...], list[float]]:
    scores = torch.arange(5.0).log_softmax(0) / params.temperature
    scores = scores + gumbel(params.seed, position, 11).float()[Certain.ids]
    shares, columns = scores.softmax(0).topk(2)
    return tuple(int(Certain.ids[i]) for i in columns), shares.tolist()


class Ragged(Certain):
    """In slot 1 it scores two more tokens, which its prompt brought: the last is the likeliest."""

    own = np.array([0, 2])
    more = torch.tensor([-1.0, 6.0, -torch.inf])  # and a column of nobody's

    def opinions(self, rows: torch.Tensor, k: int, slots: list[int], perturb):
        ids = [np.concatenate([self.ids, self.own]) if slot else self.ids for slot in slots]
        nothing = torch.full((3,), -torch.inf)
        told = [torch.cat([self.scores, self.more if slot else nothing]) for slot in slots]
        columns, probabilities = most_probable(perturb(torch.stack(told), ids), 2)
        chosen = [own[at] for own, at in zip(ids, columns.numpy(), strict=True)]
        return torch.from_numpy(np.stack(chosen)), probabilities


def test_a_prompts_own_tokens_are_masked_like_others() -> None:
    rows = [certain(position)._replace(slot=slot) for position, slot in ((5, 1), (6, 0), (7, 1))]
    head = speaking(Ragged())
    assert head.opinion(0, rows, torch.zeros(3, 2)).tokens == ((2, 10), (10, 9), (2, 10))
    masks = (allowed(0, 1), allowed(0, 2, 3, 4), allowed(2))
    said = head.opinion(0, rows, torch.zeros(3, 2), masks=tuple(mask[:1] for mask in masks))
    assert said.tokens[:2] == ((1, 0), (4, 3))
    assert said.tokens[2][0] == 2
    assert said.numbers[2, 0] == 1.0
    none = head.opinion(0, rows[1:2], torch.zeros(1, 2), masks=(allowed(0, 2),))
    assert none.tokens == ((10, 9),), "the prompt of slot 1 is not that of slot 0"


def test_a_prompts_own_tokens_have_their_noise(monkeypatch) -> None:
    noise = torch.zeros(11)
    noise[0] = 100.0
    monkeypatch.setattr("ppsd.worker.inner_head.gumbel", lambda *_: noise.double())
    head = speaking(Ragged())
    for slot in (0, 1):
        head.begin(Begin(slot, SamplingParams(temperature=1.0), 4, (), 11))
    rows = [certain(5), certain(5)._replace(slot=1)]
    assert head.opinion(0, rows, torch.zeros(2, 2)).tokens == ((10, 9), (0, 2))


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_every_pass_takes_its_time_on_an_emulated_device(monkeypatch, seconds) -> None:
    slept: list[float] = []
    monkeypatch.setattr("ppsd.worker.inner_head.time.sleep", slept.append)
    clock = Clock()
    for head in (speaking(seconds=seconds), EmulatedHead(Certain(), clock, seconds)):
        head.opinion(0, [certain(10)], torch.zeros(1, 2))
        head.observe(0, Block(2, 7, 4, 3, 0, (1,), torch.zeros(1, 2)), torch.zeros(1, 2))
        head.lag([certain(11)] * 2, torch.zeros(2, 2))
    assert slept == [pytest.approx(seconds, abs=1.0)] * 3
    assert (slept == [0.0] * 3) == (seconds == 0.0)
    assert clock.now == 3 * seconds * 1e9


@pytest.mark.parametrize("temperature", [1e-39, 5e-324])
def test_the_lowest_temperatures_are_nearly_greedy(temperature: float) -> None:
    head = speaking()
    head.begin(Begin(0, SamplingParams(temperature=temperature, seed=5), 4, (), 11))
    said = head.opinion(0, [certain(10)], torch.zeros(1, 2))
    assert said.tokens[0][0] == 10
    assert said.numbers[0, :2].tolist() == [1.0, 0.0]


def test_a_head_may_score_padded_rows_that_no_mask_covers(monkeypatch) -> None:
    monkeypatch.setattr(Certain, "ids", np.array([1, 3, 4, 9, 40]))
    head = speaking()
    said = head.opinion(0, [certain(10)], torch.zeros(1, 2), masks=(allowed(3, 9),))
    assert said.tokens == ((9, 3),)
    assert not permits(allowed(3, 9), 40)
