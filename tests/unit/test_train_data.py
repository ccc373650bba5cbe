"""Records, tokens, draft vocabulary, batches: what is trained on, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppsd.errors import ConfigError, PpsdError
from ppsd.model.tokenizer import Tokenizer
from ppsd.train.data import (
    OUTSIDE,
    PROMPT_WEIGHT,
    Encoding,
    Example,
    Vocabulary,
    choose_draft_vocab,
    count_tokens,
    encode_all,
    hold_out,
    make_batch,
    plan_epoch,
    was_read,
)
from ppsd.train.records import Record, parse_row, read_data
from tests.support.teachers import random_examples, tiny_config, tiny_teacher


@pytest.fixture
def encoding(tiny_model: Callable[[str], Path]) -> Encoding:
    return Encoding(Tokenizer.load(tiny_model("llama")), 40, "me", eos=2)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_assistant_turn_is_a_target() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    found = [(len(r.messages), r.target) for r in parse_row(row, "here")]
    assert found == [(1, "b"), (3, "d"), (5, None)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no training data"),
        ("\n \n", "holds no training data"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": ', "line 2: not JSON"),
        ('{"question": "a"}\n', "line 1: needs an object with prompt"),
        ('{"prompt": ""}\n', "line 1: needs"),
        ('{"messages": []}\n', "line 1: needs"),
        ('{"messages": [{"role": "user"}]}\n', "line 1: needs"),
        ('{"messages": [{"role": "user", "content": "a"}], "target": 5}\n', "line 1: needs .*5 is"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "target": "\\ud800"}\n',
            "line 1: needs .*text must be valid Unicode",
        ),
        ("[1]\n", "line 1: needs"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(PpsdError, match=complaint):
        read_data([str(tmp_path / "x.jsonl")])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(PpsdError, match=r"cannot read training data from .*x.txt: 'utf-8' codec"):
        read_data([str(tmp_path / "x.txt")])
    missing = tmp_path / "missing.txt"  # which the sentence names once
    with pytest.raises(PpsdError, match=f"training data from {missing}: No such file or directory"):
        read_data([str(missing)])


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="it is installed")
def test_hub_names_need_the_datasets_package() -> None:
    with pytest.raises(ConfigError, match="data must be a file, or a hub dataset with the package"):
        read_data(["owner/name"])


def test_targets_begin_after_the_chat_prompt_and_end_with_eos(
    tmp_path: Path, encoding: Encoding
) -> None:
    records, _ = read_data([write(tmp_path / "x.jsonl", {"prompt": "box", "target": "five"})])
    (example,) = encode_all(records, encoding).examples
    prompt = encoding.tokenizer.encode_chat([{"role": "user", "content": "box"}])
    assert example.tokens[: example.start].tolist() == prompt
    assert example.targets.tolist() == [*encoding.tokenizer.encode("five"), 2]


def test_exact_ids_count_only_for_the_model_that_wrote_them(
    tmp_path: Path, encoding: Encoding
) -> None:
    messages = [{"role": "user", "content": "box"}]
    row = {"messages": messages, "target": "a", "target_ids": [7, 8], "model": "me"}
    records, _ = read_data([write(tmp_path / "x.jsonl", row, row | {"model": "other"})])
    mine, others = encode_all(records, encoding).examples
    assert mine.targets.tolist() == [7, 8]
    assert others.targets.tolist() == [*encoding.tokenizer.encode("a"), 2]


def test_long_answers_are_cut_and_long_prompts_dropped(tmp_path: Path, encoding: Encoding) -> None:
    rows = [("a", "b"), ("a", "xy" * 40), ("xy" * 40, "b")]
    path = write(tmp_path / "x.jsonl", *({"prompt": p, "target": t} for p, t in rows))
    records, _ = read_data([path])
    corpus = encode_all(records, encoding)
    assert (len(corpus.examples), corpus.cut, corpus.dropped) == (2, 1, 1)
    assert len(corpus.examples[1].tokens) == 40
    with pytest.raises(PpsdError, match="no training example fits in max_length 40"):
        encode_all(records[2:], encoding)


def test_a_missing_target_names_the_row(tmp_path: Path, encoding: Encoding) -> None:
    records, _ = read_data([write(tmp_path / "x.jsonl", {"prompt": "a"})])
    with pytest.raises(PpsdError, match="line 1 has a prompt but no target; add --self-generate"):
        encode_all(records, encoding)


def test_plain_text_becomes_windows_that_lose_nothing(tmp_path: Path, encoding: Encoding) -> None:
    (tmp_path / "x.txt").write_text("pack my box with five dozen jugs " * 9)
    records, _ = read_data([str(tmp_path / "x.txt")])
    examples = encode_all(records, encoding).examples
    joined = torch.cat([e.tokens for e in examples]).tolist()
    assert joined == encoding.tokenizer.encode("pack my box with five dozen jugs " * 9)
    assert {e.start for e in examples} == {1}


def test_draft_vocabulary_is_the_most_frequent_targets() -> None:
    def example(prompt: list[int], target: list[int]) -> Example:
        return Example(torch.tensor(prompt + target, dtype=torch.int32), len(prompt))

    examples = [example([9, 9, 9], [5, 5, 5, 7]), example([9], [7, 3, 1, 5])]
    targets, none = count_tokens((e.targets for e in examples), 12), torch.zeros(12)
    ids, lost = choose_draft_vocab(targets, 3, none)
    assert ids.tolist() == [1, 5, 7]  # 1 and 3 are equally frequent
    assert lost == pytest.approx(1 / 8)
    with pytest.raises(ConfigError, match="draft_vocab"):
        choose_draft_vocab(targets, 13, none)


def test_what_is_scored_in_a_batch_has_the_tokens_of_its_prompts() -> None:
    table = torch.randn(12, 4)
    texts = [([9, 5, 2], [11, 9]), ([3, 2], [5]), ([7], [3])]
    examples = [Example(torch.tensor(p + t, dtype=torch.int32), 1, len(p)) for p, t in texts]
    batch = make_batch(examples, torch.device("cpu"))
    vocabulary = Vocabulary(torch.tensor([1, 5, 7]), table)
    scored = vocabulary.of(batch)
    assert scored.ids.tolist() == [1, 5, 7, 2, 3, 9]
    assert torch.equal(scored.rows, table[scored.ids])
    sayable = vocabulary.sayable(batch, scored).int().tolist()
    assert sayable == [[1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert scored.labels[[1, 5, 7, 2, 3, 9]].tolist() == list(range(6))
    assert scored.labels[[0, 4, 6, 8, 10, 11]].tolist() == [OUTSIDE] * 6


def test_a_head_that_scores_all_tokens_needs_no_prompts() -> None:
    table = torch.randn(12, 4)
    batch = make_batch([Example(torch.arange(5, dtype=torch.int32), 1, 2)], torch.device("cpu"))
    vocabulary = Vocabulary(None, table)
    scored = vocabulary.of(batch)
    assert scored.rows is table
    assert scored.ids.tolist() == scored.labels.tolist() == list(range(12))
    assert vocabulary.sayable(batch, scored).all()


def test_other_text_counts_for_the_draft_vocabulary_but_not_as_lost() -> None:
    targets = torch.tensor([0, 5, 3, 0, 0])
    ids, lost = choose_draft_vocab(targets, 2, torch.tensor([9, 0, 0, 1, 0]))
    assert ids.tolist() == [0, 1]
    assert lost == pytest.approx(3 / 8)


def test_all_of_a_record_is_counted_whether_answered_or_not(encoding: Encoding) -> None:
    asked = ({"role": "user", "content": "pack my box"},)
    prompt = encoding.prompt(Record("here", asked))
    open_, answered = Record("here", asked), Record("here", asked, "five dozen")
    assert encoding.all_tokens(open_).tolist() == prompt
    assert encoding.all_tokens(answered).tolist() == prompt + encoding.target(answered)
    text = Record("here", text="pack my box " * 100)
    assert encoding.all_tokens(text).tolist() == encoding.tokenizer.encode(text.text or "")


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=60), st.integers(1, 120), st.integers(0, 3)
)
def test_an_epoch_takes_every_example_once(lengths: list[int], budget: int, seed: int) -> None:
    batches = plan_epoch(lengths, budget, seed, 1)
    assert Counter(i for b in batches for i in b) == Counter(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches)
    assert batches == plan_epoch(lengths, budget, seed, 1)


def test_epochs_differ_in_order() -> None:
    lengths = [5] * 64
    assert plan_epoch(lengths, 20, 0, 0) != plan_epoch(lengths, 20, 0, 1)


def test_batch_rows_stand_before_their_targets() -> None:
    examples = random_examples(4)
    batch = make_batch(examples, torch.device("cpu"))
    following = torch.roll(batch.tokens, -1, 1).flatten()
    assert torch.equal(following[batch.rows], batch.targets)
    assert batch.targets.tolist() == [t for e in examples for t in e.targets.tolist()]
    assert batch.size == sum(len(e.tokens) for e in examples)


def test_an_answers_positions_weigh_more_than_its_prompts() -> None:
    tokens = torch.arange(8, dtype=torch.int32)
    device = torch.device("cpu")
    batch = make_batch([Example(tokens, 1, 6), Example(tokens[:3], 2, 2)], device)
    weights = torch.tensor([PROMPT_WEIGHT] * 5 + [1.0] * 2 + [1.0])
    assert PROMPT_WEIGHT < 1
    torch.testing.assert_close(batch.shares, weights / weights.sum())
    answers = make_batch([Example(tokens, 6, 6)], device)
    torch.testing.assert_close(answers.shares, torch.full((2,), 0.5))


def test_held_out_examples_are_not_trained_on() -> None:
    examples = random_examples(50)
    train, held = hold_out(examples, 64, 0)
    assert len(held) == 5
    assert {id(e) for e in train} | {id(e) for e in held} == {id(e) for e in examples}
    assert not {id(e) for e in train} & {id(e) for e in held}
    with pytest.raises(PpsdError, match="at least 2 prompts"):
        hold_out(examples[:1], 1, 0)


def test_answers_to_one_prompt_are_held_out_together() -> None:
    examples = [
        Example(torch.tensor([prompt, 7, answer], dtype=torch.int32), 2, 2, str(prompt))
        for prompt in range(20)
        for answer in range(3)
    ]
    train, held = hold_out(examples, 4, 0)
    assert len(held) == 6
    assert not {int(e.tokens[0]) for e in train} & {int(e.tokens[0]) for e in held}
    with pytest.raises(PpsdError, match="at least 2 prompts"):
        hold_out(examples[:3], 1, 0)


def test_what_heads_read_before_is_held_out_last() -> None:
    tokens = torch.tensor([1, 2, 3], dtype=torch.int32)
    examples = [Example(tokens, 2, 2, str(i), frozenset((f"{i}", "new"))) for i in range(40)]
    most, every = {str(i) for i in range(36)}, {str(i) for i in range(40)}
    _, held = hold_out(examples, 4, 0, most)
    assert {e.opening for e in held} == every - most
    assert not any(was_read(e, most) for e in held)
    assert all(was_read(e, every) for e in held)
    _, as_ever = hold_out(examples, 4, 0)
    assert {e.opening for e in as_ever} != every - most
    assert hold_out(examples, 4, 0, every)[1] == as_ever, "nothing else is left"


def test_one_question_is_held_out_together_whatever_the_system_message(encoding: Encoding) -> None:
    asked = ["Why?", "why? ", *(f"Why {i}?" for i in range(18))]
    systems = [None, "Be brief.", "Be kind."]
    rows = [{"messages": [{"role": "user", "content": text}], "target": "So."} for text in asked]
    records = [
        record
        for system in systems
        for row in rows
        for record in parse_row({**row, "messages": [*_system(system), *row["messages"]]}, "here")
    ]
    for seed in range(4):
        train, held = hold_out(encode_all(records, encoding).examples, 6, seed)
        assert held
        assert not {s for e in train for s in e.said} & {s for e in held for s in e.said}


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def test_turns_of_one_conversation_are_held_out_together(encoding: Encoding) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chats = [[{"role": role, "content": f"{text} {i}"} for role, text in turns] for i in range(12)]
    records = [r for chat in chats for r in parse_row({"messages": chat}, "here")]
    train, held = hold_out(encode_all(records, encoding).examples, 4, 0)
    assert len(held) == 2
    assert not {e.opening for e in train} & {e.opening for e in held}


def asked(encoding: Encoding, *questions: str) -> list[Example]:
    """Return the examples of a conversation in which the user asks these."""
    turns = [turn for q in questions for turn in (("user", q), ("assistant", "d"))]
    messages = [{"role": role, "content": text} for role, text in turns]
    return encode_all(parse_row({"messages": messages}, "here"), encoding).examples


def test_what_is_asked_later_on_is_held_out_with_those_who_begin_with_it(
    encoding: Encoding,
) -> None:
    examples = [e for i in range(12) for e in asked(encoding, f"a {i}", f"b {i}")]
    examples += [e for i in range(12) for e in asked(encoding, f"b {i}")]
    for seed in range(20):
        train, held = hold_out(examples, 3, seed)
        assert len(held) == 3
        said = [frozenset().union(*(e.said for e in part)) for part in (train, held)]
        assert not said[0] & said[1]


def test_what_many_say_ties_no_conversations(encoding: Encoding) -> None:
    examples = [e for i in range(12) for e in asked(encoding, f"a {i}", "go on")]
    train, held = hold_out(examples, 2, 0)
    assert (len(train), len(held)) == (22, 2)


def test_a_prompt_that_cannot_be_rendered_is_named(
    tmp_path: Path, encoding: Encoding, tiny_model: Callable[[str], Path]
) -> None:
    rows = [{"messages": [{"role": r, "content": "a"}]} for r in ("user", "unheard")]
    records, _ = read_data([write(tmp_path / "x.jsonl", *rows)])
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('who?') }}{% endif %}a"
    tokenizer = Tokenizer.load(tiny_model("llama"), strict)
    assert replace(encoding, tokenizer=tokenizer).prompt(records[0])
    with pytest.raises(PpsdError, match=r"x\.jsonl, line 2: messages must be what .* \(who\?\)"):
        replace(encoding, tokenizer=tokenizer).prompt(records[1])
    path = write(tmp_path / "y.jsonl", {"messages": [{"role": 7, "content": "a"}]})
    with pytest.raises(PpsdError, match=r"line 1: needs an object with prompt.*7 is not a non-em"):
        read_data([path])


def test_token_ids_that_the_model_does_not_know_are_named(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    encoding = tiny_teacher(tiny_model("llama"), tiny_config()).encoding
    row = {"messages": [{"role": "user", "content": "a"}], "target": "b", "model": encoding.model}
    for token in (300, -1):
        path = write(tmp_path / "x.jsonl", row | {"target_ids": [5, token]})
        records, _ = read_data([path])
        with pytest.raises(PpsdError, match=rf"line 1: prompt must be of the 300 .* id {token}"):
            encode_all(records, encoding)


def test_files_are_told_from_hub_datasets_and_may_begin_with_a_mark(tmp_path: Path) -> None:
    with pytest.raises(
        PpsdError, match=r"cannot read training data from data/none\.jsonl: No such"
    ):
        read_data(["data/none.jsonl"])
    marked = tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "target": "b"}\n')
    assert read_data([str(marked)])[0][0].target == "b"


@pytest.mark.parametrize("ids", ['["abc"]', "[Infinity]", "[null]"])
def test_ids_that_are_none_are_named_with_their_line(tmp_path: Path, ids: str) -> None:
    path = tmp_path / "odd.jsonl"
    turn = '{"role": "user", "content": "a"}'
    path.write_text(f'{{"messages": [{turn}], "target": "b", "target_ids": {ids}}}\n')
    with pytest.raises(PpsdError, match="line 1: needs an object with prompt"):
        read_data([str(path)])


def test_a_long_conversation_is_not_most_of_what_is_held_out() -> None:
    turns = [25, *[1] * 20]
    examples = [
        Example(torch.tensor([chat, 7, turn], dtype=torch.int32), 2, 2, str(chat))
        for chat, count in enumerate(turns)
        for turn in range(count)
    ]
    for seed in range(60):
        train, held = hold_out(examples, 64, seed)
        assert (len(train), len(held)) == (41, 4)
