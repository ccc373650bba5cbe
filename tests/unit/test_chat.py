"""``ppsd chat``: what is kept, what commands do, and how it ends."""

from __future__ import annotations

import json
import re
import resource
import signal

import pytest

from ppsd.cli import chat, display
from ppsd.errors import PipelineError
from ppsd.model.tokenizer import Tokenizer
from tests.support.command import user


def test_chat_keeps_conversation_and_rows(ppsd, tiny, tiny_model, expected) -> None:
    result = ppsd("chat", "--stats", "-n", 12, *tiny(), stdin="the fox\n\njugs\n/reset\nthe fox\n")
    first = expected(user("the fox"), max_tokens=12)
    conversation = [*user("the fox"), {"role": "assistant", "content": first}, *user("jugs")]
    second = expected(conversation, max_tokens=12)
    assert (result.code, result.out) == (0, f"{first}\n{second}\n{first}\n")
    kept = re.findall(r"(\d+) of (\d+) prompt tokens kept", result.err)
    turn = Tokenizer.load(tiny_model()).encode_chat(user("the fox"))
    # the second turn keeps what the first fed, the last one all of a prompt seen before but a row
    assert [int(rows) >= len(turn) for rows, _ in kept] == [True, False]
    assert kept[1] == (str(len(turn) - 1), str(len(turn)))
    assert result.err.count("cut off at --max-tokens") == 3


def test_chat_goes_on_when_the_context_is_full(ppsd, tiny, expected) -> None:
    flags = ["--max-context", 40, "-n", 4, *tiny()]
    long, longer = "five jugs " * 3, "five jugs " * 20  # no room behind fox; no room at all
    result = ppsd("chat", *flags, stdin=f"fox\n{longer}\n{long}\n/reset\n{long}\n")
    said = [expected(user(text), max_tokens=4) for text in ("fox", long.strip())]
    assert (result.code, result.out.splitlines()) == (0, said)
    refused = [line for line in result.err.splitlines() if "(the context holds 40)" in line]
    assert [line.endswith("/reset starts over.") for line in refused] == [False, True]


def test_ctrl_c_stops_an_answer_and_keeps_it(ppsd, tiny, expected, monkeypatch) -> None:
    """The partial answer stays in the conversation, and the next one is what it would be."""
    shown = []

    def show(chunk, paint):
        shown.append(chunk.text)
        display.show(chunk, paint)
        if len(shown) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "show", show)
    before = signal.getsignal(signal.SIGINT)
    result = ppsd("chat", "-n", 12, *tiny(), stdin="the fox\njugs\n")
    partial = "".join(shown[:5])
    conversation = [*user("the fox"), {"role": "assistant", "content": partial}, *user("jugs")]
    assert result.out == f"{partial}\n{expected(conversation, max_tokens=12)}\n"
    assert "(stopped)" in result.err
    assert result.code == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_drops_the_line_alone(ppsd, tiny, expected, monkeypatch) -> None:
    """What comes after is answered, and what ends the conversation is told as what it is."""
    typed = "the fox\njug\x03\n\x03\n\x03\njugs\n"
    before = signal.getsignal(signal.SIGINT)
    result = ppsd("chat", "-n", 4, *tiny(), stdin=typed, typed=True)
    first = expected(user("the fox"), max_tokens=4)
    conversation = [*user("the fox"), {"role": "assistant", "content": first}, *user("jugs")]
    said = f"{first}\n{expected(conversation, max_tokens=4)}\n"
    assert (result.code, result.out) == (0, said), "a file holds answers, and no prompt"
    assert result.err.endswith("> \n")
    assert signal.getsignal(signal.SIGINT) is before

    def fail(self: object, line: str) -> None:
        raise PipelineError("stage 1 is gone")

    monkeypatch.setattr(chat.Conversation, "take", fail)
    result = ppsd("chat", *tiny(), stdin="\x03\nfox\n", typed=True)
    assert (result.code, result.err.count("stage 1 is gone")) == (1, 1)


def test_unknown_commands_are_refused_with_the_list(ppsd, tiny, expected) -> None:
    result = ppsd("chat", "-n", 4, *tiny(), stdin="/rest\n/reset now\n/save\n/stats\nfox\n")
    assert (result.code, result.out) == (0, expected(user("fox"), max_tokens=4) + "\n")
    assert f"/rest is no command; there are {', '.join(chat.COMMANDS)}" in result.err
    assert "/reset must be typed without anything behind it, got 'now'" in result.err
    assert "/save must be followed by the name of a file, got ''" in result.err
    assert "/stats: no answer was completed yet" in result.err


def test_a_message_may_begin_with_a_slash_behind_a_space(ppsd, tiny, expected) -> None:
    result = ppsd("chat", "-n", 4, *tiny(), stdin=" /etc\n/exit\nfox\n")
    assert (result.code, result.out) == (0, expected(user("/etc"), max_tokens=4) + "\n")


def test_help_lists_every_command_and_hints_are_for_terminals(ppsd, tiny) -> None:
    result = ppsd("chat", "-n", 4, *tiny(), stdin="/help\nfox\n/stats\n/quit\n")
    assert all(f"\n{name} " in f"\n{result.err}" for name in chat.COMMANDS)
    assert chat.HINT not in result.err
    assert result.err.count("tokens/s") == 1  # by /stats alone
    assert "drafts: 3 of 3 accepted" in result.err


def test_the_system_message_can_be_changed_and_removed(ppsd, tiny, expected) -> None:
    lines = "/system be brief\nfox\n/reset\nfox\n/system\n/reset\nfox\n"
    result = ppsd("chat", "-n", 4, *tiny(), stdin=lines)
    brief = expected([{"role": "system", "content": "be brief"}, *user("fox")], max_tokens=4)
    assert result.out == f"{brief}\n{brief}\n{expected(user('fox'), max_tokens=4)}\n"


def test_save_writes_the_conversation_and_no_file_twice(ppsd, tiny, expected, tmp_path) -> None:
    place = tmp_path / "talk.json"
    lines = f"fox\n/save {place}\njugs\n/save {place}\n/save {tmp_path}/no/where\n/save a\0b\n"
    result = ppsd("chat", "--system", "be brief", "-n", 4, *tiny(), stdin=lines)
    system = {"role": "system", "content": "be brief"}
    answer = expected([system, *user("fox")], max_tokens=4)
    said = [system, *user("fox"), {"role": "assistant", "content": answer}]
    assert json.loads(place.read_text()) == said
    assert f"3 messages saved in {place}" in result.err
    assert "/save must be a new file (embedded null byte), got 'a\\x00b'" in result.err
    assert "must be a new file (File exists)" in result.err
    assert "must be a new file (No such file or directory)" in result.err
    assert result.code == 0


def test_a_full_disk_leaves_no_part_of_a_conversation(ppsd, tiny, tmp_path, monkeypatch) -> None:
    """The same name can be given again once there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits, save = iter((10, soft)), chat.Conversation._save

    def limited(self: chat.Conversation, name: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (next(limits), hard))
        try:
            save(self, name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(chat.Conversation, "_save", limited)
    place = tmp_path / "talk.json"
    result = ppsd("chat", "-n", 4, *tiny(), stdin=f"fox\n/save {place}\n/save {place}\n")
    assert f"/save must be a new file (File too large), got '{place}'" in result.err
    assert f"2 messages saved in {place}" in result.err
    assert len(json.loads(place.read_text())) == 2


@pytest.mark.parametrize("stdin", ["", "\n \n", "/reset\n/quit\n", "five jugs " * 40 + "\n"])
def test_a_pipe_that_got_no_answer_fails(ppsd, tiny, stdin) -> None:
    result = ppsd("chat", "--max-context", 40, "-n", 4, *tiny(), stdin=stdin)
    assert (result.code, result.out) == (1, "")
    assert "\nppsd: standard input held no message" in f"\n{result.err}"
    assert "/reset starts over" not in result.err  # there is nothing to forget


def test_an_answer_is_not_cut_before_the_context_is_full(ppsd, tiny, tiny_model) -> None:
    result = ppsd("chat", "--max-context", 400, "--stats", *tiny(), stdin="fox\n")
    prompt = len(Tokenizer.load(tiny_model()).encode_chat(user("fox")))
    assert f"{400 - prompt} tokens · " in result.err
    assert "cut off: the context of 400 tokens is full" in result.err
