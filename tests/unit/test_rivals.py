"""DEL and KNN-SSD: their choices by hand, and plain decoding's tokens on all kinds of stages."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppsd import LLM, SamplingParams
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.baselines import Outsider, OutsiderProcess
from ppsd.lab.emulated import EmulatedPipeline
from ppsd.lab.rivals.chain import ranks_that_answer
from ppsd.lab.rivals.dynamic import DECAY, MOST_DRAFTS, DynamicExit
from ppsd.lab.rivals.jobs import Job, Reply, decode, encode, is_rivals
from ppsd.lab.rivals.rivals import DEL_HEADS, FIXED, NAMES, RivalPipeline, Rivals, used_by
from ppsd.lab.rivals.skips import (
    ATTENTION,
    MLP,
    SkipSets,
    find_skips,
    kept_halves,
    odd_layers,
    place_of,
    together,
)
from ppsd.measure.workload import digest, load_tasks
from ppsd.model.head_files import weights_digest
from ppsd.model.identity import Identity
from ppsd.model.source import describe, resolve_model
from ppsd.model.weights import open_source
from ppsd.speculation.lookup import Match
from ppsd.transport.base import gather, part_bytes
from ppsd.worker.messages import Control
from ppsd.worker.messages import encode as encode_message
from tests.support.command import lab
from tests.support.tiny_models import save_perfect_head

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 17  # two chunks
PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)
EVERY = (*NAMES, f"{FIXED}2")
PACE = (0.3, 0.2, 0.5)


def test_del_counts_and_chooses_as_published() -> None:
    state = DynamicExit({2: 2.0, 4: 4.0}, 8.0)
    assert (state.exit, state.length) == (2, 1)
    state.fill({2: [(7, 0.5), (8, 0.25)], 4: [(7, 0.75), (9, 0.5)]}, [7, 9])
    low, high = state.counts[2], state.counts[4]
    assert (low.rate, high.rate) == (0.5, 1.0)
    assert low.threshold == pytest.approx((0.5 + 0.25) / 2)
    assert high.threshold == pytest.approx((0.75 + 0.5) / 2)  # it was never wrong
    state.update({2: [(1, 0.5)], 4: [(1, 1.0)]}, [2])
    assert low.rate == pytest.approx(DECAY / (2 * DECAY + 1))
    rates = {2: low.rate, 4: 2 * DECAY / (2 * DECAY + 1)}
    best = max(
        ((e, n) for n in range(MOST_DRAFTS + 1) for e in rates),
        key=lambda c: (1 - rates[c[0]] ** (c[1] + 1)) / (1 - rates[c[0]]) / (8 + c[0] * c[1]),
    )
    assert (state.exit, state.length) == best == (4, 1)


def test_del_decodes_plainly_where_exits_are_never_right() -> None:
    state = DynamicExit({1: 1.0, 2: 2.0}, 4.0)
    state.update({1: [(1, 0.9)], 2: [(1, 0.9)]}, [2])
    assert state.length == 0


def test_del_drafts_as_far_as_it_may_where_an_exit_is_always_right() -> None:
    state = DynamicExit({1: 1.0, 2: 2.0}, 8.0)
    state.update({1: [(2, 0.9)], 2: [(1, 0.9)]}, [2])
    assert (state.exit, state.length) == (1, MOST_DRAFTS)


def test_skip_sets() -> None:
    assert odd_layers(4) == (2, 3, 6, 7)
    halves = kept_halves((2, 3, 5, 8), 0, 5)
    assert halves == [(0, 0), (0, 1), (2, ATTENTION), (3, 0), (3, 1), (4, MLP)]
    assert list(together(halves)) == [(0, 1, None), (2, 3, ATTENTION), (3, 4, None), (4, 5, MLP)]
    assert list(together(kept_halves((), 2, 6))) == [(2, 6, None)]


def test_the_nearest_centre_by_cosine_decides() -> None:
    centres = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    sets = SkipSets("m", {"a": (1,), "b": (2, 3)}, ["a", "b", "b"], centres, {"tokens": 2})
    again = SkipSets.from_json(json.loads(json.dumps(sets.to_json())))
    assert again.skips == sets.skips
    assert again.nearest(np.array([50.0, 40.0], np.float32)) == ("b", (2, 3))
    assert again.nearest(np.array([5.0, 1.0], np.float32)) == ("a", (1,))


def test_messages_come_back_as_they_were() -> None:
    rows = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    job = Job("verify", 5, (1, 2), exit=3, skip=(4,), shadows=2, matches=(None, Match(7, 3)),
              exits=(3,), heads={3: "x"}, rows=rows, verified=rows[:1].float())  # fmt: skip
    reply = Reply(2, (1,), (0.5,), {3: [(1, 0.5)]}, rows)
    for message in (job, reply):
        parts = encode(message)
        frame = torch.empty(sum(map(part_bytes, parts)), dtype=torch.uint8)
        gather(parts, frame.data_ptr())
        assert is_rivals(frame.numpy().data)
        found = decode(frame.numpy().data)
        assert vars(found).keys() == vars(message).keys()
        for name, value in vars(message).items():
            own = getattr(found, name)
            assert torch.equal(own, value) if torch.is_tensor(value) else own == value
    frame = b"".join(bytes(part) for part in encode_message(Control("stop")))
    assert not is_rivals(memoryview(frame))


def test_who_answers() -> None:
    bounds, exits = (0, 2, 4, 6), (1, 2, 3)
    assert ranks_that_answer(Job("setup"), bounds, exits) == {0, 1, 2}
    assert ranks_that_answer(Job("draft", exit=2), bounds, exits) == {0}
    assert ranks_that_answer(Job("draft", exit=6), bounds, ()) == {2}
    assert ranks_that_answer(Job("prompt", shadows=3), bounds, exits) == set()
    assert ranks_that_answer(Job("prompt", last=True, shadows=3), bounds, exits) == {0, 1, 2}
    assert ranks_that_answer(Job("verify"), bounds, exits) == {2}


def opened(model: Path, kind: str = "inprocess", stages: int = 3, **more: object) -> LLM:
    kinds = {
        "inprocess": {"transport": "inprocess"},
        "processes": {"pipeline": RivalPipeline},
        "virtual": {"pipeline": EmulatedPipeline, "pace": PACE},
    }
    settings = {"dtype": "float32", "head": "untrained", "mode": "ppsd", "gate": False}
    if stages == 1:
        settings |= {"head": "none", "mode": "autoregressive"}
    return LLM(str(model), stages=stages, **settings | kinds[kind] | more)


def plainly(llm: LLM) -> tuple[int, ...]:
    llm.use("autoregressive")
    return llm.run(PROMPT, PARAMS).token_ids


@pytest.mark.parametrize("kind", ["inprocess", "virtual", "processes"])
def test_rivals_say_what_plain_decoding_says(tiny_model, kind) -> None:
    with opened(tiny_model(), kind) as llm:
        plain, rivals = plainly(llm), Rivals(llm)
        for name in (*EVERY, *NAMES[:2]):  # in turns, as benchmarks ask
            found = rivals.run(name, PROMPT, PARAMS)
            assert tuple(found.tokens) == plain, name
            assert found.rounds + sum(found.accepted) == len(plain) - 1
        assert plainly(llm) == plain


def quiet_tail(model: Path, to: Path, first: int) -> Path:
    """Copy a model, whose layers from ``first`` on then add nothing: its exits are right there."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = load_file(to / "model.safetensors")
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[-2] in ("o_proj", "down_proj") and int(parts[2]) >= first:
            tensor.zero_()
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    ("kind", "stages"), [("inprocess", 1), ("inprocess", 3), ("virtual", 3), ("processes", 3)]
)
def test_del_drafts_where_exits_are_right(tiny_model, tmp_path, kind, stages) -> None:
    model = quiet_tail(tiny_model(), tmp_path / "quiet", 3)
    with opened(model, kind, stages) as llm:
        plain, found = plainly(llm), Rivals(llm).run("del", PROMPT, PARAMS)
    assert tuple(found.tokens) == plain
    assert sum(found.accepted) > len(plain) // 2
    assert found.resyncs < 2


@pytest.mark.parametrize("kind", ["inprocess", "processes"])
def test_drafts_of_a_perfect_head_are_all_accepted(tiny_model, tmp_path, kind) -> None:
    model = tiny_model()
    head = save_perfect_head(tmp_path / "head", model, 2)
    given = {"split": (2, 4), "head": str(head), "lookup": False}
    with opened(model, kind, **given) as llm:
        plain, found = plainly(llm), Rivals(llm).run(f"{FIXED}3", PROMPT, PARAMS)
    assert tuple(found.tokens) == plain
    assert found.counts["judged"] == found.counts["drafted"]
    assert found.rounds == math.ceil((len(plain) - 1) / 4)
    assert found.resyncs == 0


def test_a_round_takes_the_passes_that_it_made_one_after_another(tiny_model, tmp_path) -> None:
    """Stages work in turns, so on emulated devices a round's time is the sum of its passes."""
    model = tiny_model()
    head = save_perfect_head(tmp_path / "head", model, 2)
    given = {"split": (2, 4), "head": str(head), "lookup": False}
    with opened(model, "virtual", **given) as llm:
        rivals = Rivals(llm)
        found = rivals.run(f"{FIXED}3", PROMPT, PARAMS)
        spec = llm.layout.spec
        head_layers = 4 + (300 * 32 + 32 * 32) / spec.layer_parameters  # its own, input, LM head
    draft = PACE[0] * (1 + head_layers / 2)
    drafts, rounds = found.drafted, found.rounds
    assert found.seconds == pytest.approx(drafts * draft + rounds * sum(PACE), rel=1e-6)


def test_skipped_drafts_cost_what_is_left(tiny_model) -> None:
    with opened(tiny_model(), "virtual", split=(2, 4)) as llm:
        found = Rivals(llm).run("knn-ssd", PROMPT, PARAMS)
        lm_head = llm.layout.spec.head_parameters / llm.layout.spec.layer_parameters
    last = PACE[2] * (1 + lm_head) / (2 + lm_head)  # one of two layers, and the LM head
    draft = PACE[0] / 2 + PACE[1] / 2 + last
    assert found.seconds == pytest.approx(found.drafted * draft + found.rounds * sum(PACE))


def test_rivals_are_greedy_and_need_heads_where_they_say_so(tiny_model) -> None:
    with opened(tiny_model(), stages=1) as llm:
        rivals = Rivals(llm)
        with pytest.raises(ConfigError, match="temperature"):
            rivals.run("del", PROMPT, SamplingParams(1.0))
        with pytest.raises(ConfigError, match="head"):
            rivals.run("del-heads", PROMPT, PARAMS)


def test_an_answer_ends_with_the_end_token(tiny_model) -> None:
    with opened(tiny_model()) as llm:
        plain = plainly(llm)
        params = SamplingParams(max_tokens=16, stop_token_ids=(plain[5],))
        llm.use("autoregressive")
        wanted = llm.run(PROMPT, params).token_ids
        rivals = Rivals(llm)
        for name in EVERY:
            assert tuple(rivals.run(name, PROMPT, params).tokens) == wanted


def test_skip_sets_are_found_by_the_model(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path))
    assert find_skips("f" * 64) is None
    sets = SkipSets("f" * 64, {"a": (1,)}, ["a"], np.ones((1, 2), np.float32), {})
    place_of("f" * 64).write_text(json.dumps(sets.to_json()))
    assert find_skips("f" * 64) is not None
    place_of("f" * 64).write_text("{}")
    with pytest.raises(PpsdError, match="no result of knn-ssd-search"):
        find_skips("f" * 64)


@pytest.mark.weights
@pytest.mark.parametrize("stages", [1, 3])
def test_rivals_are_exact_on_real_weights(stages) -> None:
    settings = {"head": "auto", "mode": "ppsd"} if stages > 1 else {"mode": "autoregressive"}
    params = SamplingParams(max_tokens=8)
    with LLM(stages=stages, transport="inprocess", plan="off", **settings) as llm:
        llm.use("autoregressive")
        ids = llm.encode("Name the planets, one a line.")
        plain, rivals = llm.run(ids, params).token_ids, Rivals(llm)
        found = {name: rivals.run(name, ids, params) for name in NAMES}
    assert {name: tuple(f.tokens) for name, f in found.items()} == dict.fromkeys(NAMES, plain)
    assert found["del-heads"].drafted > 1


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [
        {"question_id": i, "category": name, "prompt": f"say {name * (i + 1)}"}
        for i, name in enumerate("abab")
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_measurements_say_which_heads_rivals_found(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PPSD_HEAD_DIR", str(tmp_path))
    files = resolve_model(str(tiny_model()))
    identity = Identity.of(describe(files), open_source(files.path))
    assert used_by(["ppsd", "del"], identity) == {}
    assert used_by([DEL_HEADS], identity) == {"rival_heads": {}}
    place = save_perfect_head(tmp_path / "head", files.path, 3)
    assert used_by([f"{FIXED}2"], identity) == {"rival_heads": {3: weights_digest(place)}}


def test_a_search_finds_what_tasks_use_and_goes_on_where_it_stopped(
    tiny_model, tmp_path, prompts, monkeypatch
) -> None:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    model = f"--model {tiny_model()} --dtype float32"
    flags = [*model.split(), "--prompts", str(prompts), "-n", "4", "--json"]
    search = ["knn-ssd-search", *flags, "--evaluations", "7", "--samples", "1", "--centres", "2"]
    result = lab(*search, "--out", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["owners"] == ["a", "a", "b", "b"]
    assert record["budget"]["evaluations"] == 7
    assert record["skips"].keys() == {"a", "b"}
    assert not list(tmp_path.glob("*.part"))

    stopped = tmp_path / "again.json.part"
    tasks = {"budget": {"evaluations": 7, "prompts": 1, "tokens": 4, "centres": 2},
             "tasks": ["0", "1", "2", "3"], "asked": digest(load_tasks(prompts)),
             "fingerprint": record["fingerprint"]}  # fmt: skip
    best = {"task": "a", "skip": [5], "score": 99.0}
    stopped.write_text(f'{json.dumps(tasks)}\n{json.dumps(best)}\n{{"task": "a", "sk')
    again = json.loads(lab(*search, "--out", str(tmp_path / "again.json")).stdout)
    assert again["skips"] == record["skips"] | {"a": [5]}
    stopped.write_text('{"other": 1}\n')
    result = lab(*search, "--out", str(tmp_path / "again.json"))
    assert isinstance(result.exception, PpsdError)
    assert "other settings" in str(result.exception)

    assert lab(*search).exit_code == 0  # where tasks look for it
    names = "ppsd,draft-then-verify γ=2,ppsd rows=4,del,knn-ssd"
    more = ["--head", "untrained", "--transport", "inprocess", "--stages", "2"]
    result = lab("tasks", *flags, *more, "--variants", names)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {row["variant"]: row for row in found["rows"] if row["group"] == "all"}
    assert list(rows) == ["plain", *names.split(",")]
    assert {row["differing"] for row in rows.values()} == {0}
    assert found["settings"]["knn-ssd"]["evaluations"] == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variants", "eagle"], "names of plain, ppsd"),
        (["--variants", "ppsd rows=x"], "number"),
        (["--variants", "del", "--sampled"], "greedily"),
    ],
)
def test_variants_that_cannot_be(tiny_model, prompts, flags, words) -> None:
    model = f"--model {tiny_model()} --dtype float32 --head untrained --transport inprocess"
    result = lab("tasks", *model.split(), "--prompts", str(prompts), *flags)
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_a_search_needs_its_libraries_and_enough_prompts(tiny_model, prompts, monkeypatch) -> None:
    flags = f"--model {tiny_model()} --dtype float32 --prompts {prompts}".split()
    result = lab("knn-ssd-search", *flags, "--samples", "3")
    assert isinstance(result.exception, ConfigError)
    assert "at most the prompts of a, 2" in str(result.exception)
    monkeypatch.setitem(sys.modules, "optuna", None)
    out = str(prompts.with_name("x.json"))
    result = lab("knn-ssd-search", *flags, "--samples", "1", "--out", out)
    assert "ppsd-llm[lab]" in str(result.exception)


@pytest.mark.parametrize("name", ["del", "knn-ssd"])
def test_rivals_in_one_process_beside_other_decoders(tiny_model, name) -> None:
    path = str(tiny_model())
    other = OutsiderProcess(Outsider(name, kind="rival"), path, "float32", 1)
    try:
        found = other.ask({"ids": PROMPT, "max_tokens": 8})
    finally:
        other.close()
    with opened(tiny_model()) as llm:
        assert tuple(found["ids"]) == plainly(llm)[:8]
    assert found["timed_tokens"] == 7
