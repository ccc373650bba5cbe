"""The verbs in this process, on a tiny model: what they print where, and how they exit."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ppsd import LLM, __version__
from ppsd.cli import display
from ppsd.cli.streams import visible
from ppsd.engine.answer import Answer, Chunk
from ppsd.engine.text import Piece
from tests.support.command import user

SGR = re.compile(r"\x1b\[(\d+)m([^\x1b]*)")
RECORD = (
    "text token_ids finish_reason mode block in_flight stages exit_layer prompt_tokens "
    "cached_tokens new_tokens counts acceptance_rate prefill_seconds decode_seconds "
    "tokens_per_second speedup_bounds stage_busy_share gate memory_bytes memory_needed_bytes pace "
    "overruns sampling kernels"
)


def test_version(ppsd) -> None:
    assert ppsd("--version").out == f"ppsd {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "hi", "--max-token", "3"], "--max-tokens"),
        (["genrate"], "Did you mean 'generate'?"),
        (["generate", "hi", "-n", "x"], "'--max-tokens': Input should be a valid integer"),
        (["generate"], "PROMPT: it is missing; '-' reads it from stdin"),
        (["verify"], "Missing argument 'PROMPTS'"),
    ],
)
def test_usage_errors_exit_with_2_and_a_hint(ppsd, arguments, hint) -> None:
    result = ppsd(*arguments)
    assert (result.code, result.out) == (2, "")
    assert hint in result.err


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["generate", ""], "prompt must be a non-empty text, got ''"),
        (["generate", "-"], "prompt must be a non-empty text, got ''"),
        (["generate", "x", "--mode", "fast"], "mode must be one of auto, autoregressive, draft-"),
        (["generate", "x", "-n", "0"], "max_tokens must be an integer in [1, "),
        (["generate", "x", "--split", "a"], "split must be integers separated by commas, got 'a'"),
        (["generate", "x", "--logit-bias", "5"], "logit_bias must be id:bias pairs separated by"),
        (["generate", "x", "--samples", "2", "-t", "0"], "samples must be 1 at temperature 0"),
        (["generate", "x", "--samples", "0"], "samples must be an integer in [1, 1024], got 0"),
        (["generate", "x", "--raw", "--system", "y"], "system must be left out with --raw"),
        (["generate", "x", "--raw", "--chat-template", "{{"], "chat_template must be left out wi"),
        (["generate", "x", "--trace", "/no/where/t"], "trace must be a file in a directory that"),
        (["generate", "x", "-m", "/no/where"], "model '/no/where' does not exist; allowed are"),
        (["generate", "x", "-m", ""], "model must be a text or a path that is not empty, got ''"),
        (["generate", "x", "--head", ""], "head must be a text or a path that is not empty"),
        (["generate", "x", "--plan", ""], "plan must be a text or a path that is not empty"),
        (["generate", "x", "-m", "src"], "src: this directory has no config.json"),
        (["verify", "/no/where"], "cannot read prompts from /no/where: No such file or directory"),
        (["verify", "README.md", "--limit", "0"], "limit must be at least 1, got 0"),
        (["chat", "--top-p", "0"], "top_p must be a number in (0, 1], got 0.0"),
    ],
)
def test_errors_exit_with_1_and_one_line(ppsd, monkeypatch, arguments, cause) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = ppsd(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"ppsd: {cause}")
    assert result.err.count("\n") == 1


TORCHS = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nat")


@pytest.mark.parametrize(
    ("error", "told"), [(TORCHS, " ([enforce fail] DefaultCPUAllocator"), (MemoryError(), "\n")]
)
def test_too_little_memory_is_said_in_a_line(ppsd, tiny, monkeypatch, error, told: str) -> None:
    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr("ppsd.engine.llm.LLM.stream", load)
    result = ppsd("generate", "x", *tiny())
    assert (result.code, result.out) == (1, "")
    assert f"\nppsd: not enough memory{told}" in result.err


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_generate_prints_the_answer_alone_on_stdout(ppsd, tiny, expected, sign) -> None:
    result = ppsd("generate", "the quick", "-n", 24, "--stats", *tiny(sign))
    assert (result.code, result.out) == (0, expected(user("the quick"), max_tokens=24) + "\n\n")
    assert re.search(r"\n24 tokens · [\d.]+ tokens/s · .* · cut off at --max-tokens", result.err)
    assert re.search(r"\nppsd · [\d.]+ s to the first token\n", result.err)
    assert f"drafts: {'23 of 23 accepted (100%)' if sign > 0 else '0 of '}" in result.err
    assert [line.split()[:2] for line in result.err.splitlines()[-3:]] == [
        ["0", "0–1"],
        ["1", "2–3"],
        ["2", "4–5"],
    ]


def test_paced_figures_say_so(ppsd, tiny) -> None:
    flags = ["generate", "the quick", "-n", 4, *tiny(), "--pace", "0.001,0.002,0.001"]
    label = "4 tokens (PACED: emulated stages of 0.001, 0.002, 0.001 s a block; "
    assert label in ppsd(*flags).err
    assert json.loads(ppsd(*flags, "--json").out)["pace"] == [0.001, 0.002, 0.001]


def test_stdin_raw_and_system(ppsd, tiny, expected) -> None:
    flags = ["--json", "-n", 8, *tiny()]
    said = json.loads(ppsd("generate", "-", "--raw", *flags, stdin="fox\n").out)["text"]
    assert said == expected("fox\n", max_tokens=8)
    said = json.loads(ppsd("generate", "fox", "--system", "be brief", *flags).out)["text"]
    messages = [{"role": "system", "content": "be brief"}, *user("fox")]
    assert said == expected(messages, max_tokens=8)


def test_json_is_all_there_is_on_stdout(ppsd, tiny, expected) -> None:
    result = ppsd("generate", "the quick", "--json", "-n", 24, *tiny(-1.0))
    record = json.loads(result.out)
    assert record["text"] == expected(user("the quick"), max_tokens=24)
    assert set(record) == set(RECORD.split())
    assert (record["mode"], record["block"], record["in_flight"]) == ("ppsd", 1, 3)
    assert (record["stages"], record["exit_layer"]) == ([[0, 2], [2, 4], [4, 6]], 2)
    assert record["new_tokens"] == len(record["token_ids"]) == 24
    counts = record["counts"]
    assert set(counts) == {"judged", "accepted", "discarded", "resyncs", "rows"}
    assert counts["resyncs"] == counts["judged"] - counts["accepted"] > 0
    assert record["acceptance_rate"] == counts["accepted"] / counts["judged"]
    assert record["tokens_per_second"] == pytest.approx(23 / record["decode_seconds"])
    assert all(0 < share <= 1 for share in record["stage_busy_share"])


def test_the_gate_s_pauses_are_told(ppsd, tiny) -> None:
    """In draft-then-verify it measures plain decoding first, so it pauses for certain."""
    flags = ["generate", "the quick", "-n", 24, "--mode", "draft-then-verify", *tiny(-1.0)]
    record = json.loads(ppsd(*flags, "--json").out)
    assert record["gate"]["pauses"] >= 1
    assert 3 <= record["gate"]["paused_tokens"] < 24
    told = ppsd(*flags, "--stats").err
    assert re.search(r"resyncs · paused (once|\d times), for \d+ tokens: plain", told)
    assert re.search(r" tokens/s · [\d.]+× plain decoding \(measured\) · cut", told)
    low, high = record["speedup_bounds"]
    assert low == high > 0
    ungated = json.loads(ppsd(*flags, "--json", "--no-gate").out)
    assert ungated["gate"] is ungated["speedup_bounds"] is None
    told = ppsd(*flags, "--stats", "--no-gate").err
    assert "plain decoding was not measured" in told
    assert "paused" not in told


def test_json_of_samples_is_a_list(ppsd, tiny) -> None:
    flags = ["generate", "fox", "--json", "-t", 1, "-n", 8, *tiny()]
    both = json.loads(ppsd(*flags, "--samples", 2, "--seed", 4).out)
    single = [json.loads(ppsd(*flags, "--seed", seed).out) for seed in (4, 5)]
    assert [one["token_ids"] for one in both] == [one["token_ids"] for one in single]
    assert [one["sampling"]["seed"] for one in both] == [4, 5]


def test_a_stop_string_ends_the_text_and_is_not_printed(ppsd, tiny, expected) -> None:
    whole = expected(user("the quick"), max_tokens=24)
    stop = whole[9:12]
    result = ppsd("generate", "the quick", "--stop", stop, "-n", 24, *tiny())
    assert result.out == whole[: whole.index(stop)] + "\n\n"
    assert "cut" not in result.err
    record = json.loads(
        ppsd("generate", "the quick", "--stop", stop, "--json", "-n", 24, *tiny()).out
    )
    assert stop not in record["text"]
    assert record["new_tokens"] == len(record["token_ids"]) < 24


@pytest.mark.parametrize(("environment", "coloured"), [("FORCE_COLOR", True), ("NO_COLOR", False)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_highlight_colours_every_token_by_its_origin(
    ppsd, tiny, expected, monkeypatch, environment, coloured, sign
) -> None:
    monkeypatch.setenv(environment, "1")
    out = ppsd("generate", "the quick", "--highlight", "-n", 24, *tiny(sign)).out
    whole = expected(user("the quick"), max_tokens=24)
    shown = visible(whole) if coloured else whole  # as on a terminal
    assert re.sub(r"\x1b\[\d+m", "", out) == shown + "\n\n"
    colours = {text: code for code, text in SGR.findall(out) if text.strip()}
    if not coloured:
        assert colours == {}
    elif sign > 0:  # all but the first token, which no draft preceded, are accepted drafts
        assert [code for code, text in SGR.findall(out) if text.strip()].count("31") == 1
        assert "32" in colours.values()
    else:
        assert set(colours.values()) == {"31"}


def test_model_output_is_printed_unchanged(monkeypatch, capsys) -> None:
    """Rich would read markup, expand tabs and drop carriage returns."""
    text = "[/bold]\tall:\r\n\t[red]:smile:"
    display.show(Chunk((Piece(text, True),)), display.painter(highlight=True))
    assert capsys.readouterr().out == text


def test_what_is_shown_was_committed_before(ppsd, tiny, monkeypatch) -> None:
    """Streaming; and what is on the screen only ever grows, so no rejected draft was on it."""
    committed: list[Chunk] = []
    shown: list[Chunk] = []
    take, stdout_write = Answer.take, display.show

    def taken(self, emit, now):
        committed.append(take(self, emit, now))
        return committed[-1]

    def show(chunk, paint):
        shown.append(chunk)
        assert shown[:12] == committed[: len(shown)][:12]
        stdout_write(chunk, paint)

    monkeypatch.setattr(Answer, "take", taken)
    monkeypatch.setattr("ppsd.cli.generate.show", show)
    ppsd("generate", "the quick", "-n", 12, *tiny(-1.0))
    assert len(committed) == 12
    assert shown[:12] == committed


def test_trace_file(ppsd, tiny, tmp_path) -> None:
    result = ppsd("generate", "fox", "-n", 4, "--trace", tmp_path / "t.json", *tiny())
    assert f"trace written to {tmp_path / 't.json'}" in result.err
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X" and e["name"] == "verify"} == {2, 3}


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_ctrl_c_exits_with_130(ppsd, tiny, monkeypatch, verb) -> None:
    """In chat the second one within an answer; the first only asks."""

    def show(chunk, paint):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(f"ppsd.cli.{verb}.show", show)
    words = ["fox"] if verb == "generate" else []
    result = ppsd(verb, *words, "-n", 12, *tiny(), stdin="fox\n")
    assert result.code == 130
    assert "Traceback" not in result.err


def test_ctrl_c_that_an_extension_swallows_is_one(ppsd, tiny, monkeypatch) -> None:
    """safetensors, interrupted half-way, raised ValueError about the shape of a storage."""

    def show(chunk, paint):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of a storage") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("ppsd.cli.generate.show", show)
    result = ppsd("generate", "fox", "-n", 12, *tiny())
    assert (result.code, result.err.count("Traceback"), result.err.count("shape")) == (130, 0, 0)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the quick", "id": "a"}\n{"question": "fox", "id": "b"}\n')
    return path


@pytest.mark.parametrize("mode", ["ppsd", "draft-then-verify"])
def test_verify_passes(ppsd, tiny, prompts, mode) -> None:
    result = ppsd("verify", prompts, "-n", 12, "--mode", mode, *tiny(-1.0))
    assert result.code == 0
    bits = "logits bitwise equal" if mode == "ppsd" else "logits "
    assert re.search(rf"^a: 12 tokens equal, {bits}.*, smallest margin \d", result.out)
    assert "\n2 of 2 prompts exactly equal, " in result.out
    assert result.out.endswith("\nPASS\n")


def test_verify_judges_drafts_unless_the_gate_is_asked_for(ppsd, tiny, prompts) -> None:
    """Of long blocks a gate measures plain decoding first: a short answer would have no draft."""
    flags = ["verify", prompts, "-n", 3, "--mode", "draft-then-verify", *tiny()]
    told = ppsd(*flags)
    assert "\n2 drafts judged, 2 of them accepted\nPASS\n" in told.out
    assert "no draft was judged" not in told.err
    record = json.loads(ppsd(*flags, "--json").out)
    assert (record["judged"], record["accepted"], record["passed"]) == (2, 2, True)
    gated = ppsd(*flags, "--gate", "--json")
    assert json.loads(gated.out)["judged"] == 0
    assert "no draft was judged, so this says nothing of mode draft-then-verify" in gated.err
    assert "judged" not in ppsd("verify", prompts, "-n", 3, *tiny(), "--mode", "autoregressive").err


def test_verify_tells_its_own_defaults(ppsd) -> None:
    told = ppsd("verify", "--help").out
    assert "[default: ppsd]" in told
    assert "[default: no-gate]" in told


def test_verify_says_what_it_compared(ppsd, tiny, prompts) -> None:
    flags = ["--concurrent", "2", "--rows", "4", "--mode", "ppsd", "--head", "untrained"]
    result = ppsd("verify", prompts, "-n", 6, *flags, *tiny())
    assert result.code == 0
    assert "\n2 requests at once, 4 rows of candidate trees in a wave, each against" in result.out
    assert "\n2 of 2 prompts exactly equal, 2 with bitwise equal logits" in result.out


def test_verify_finds_a_mismatch(ppsd, tiny, prompts, monkeypatch) -> None:
    """One wrong token in the mode under test, in the second prompt."""
    plain_run = LLM.run_all
    calls = []

    def run_all(self, prompts, params, sinks):
        [completion] = plain_run(self, prompts, params, sinks)
        calls.append(self.config.mode)
        if len(calls) != 4:
            return [completion]
        wrong = (completion.token_ids[5] + 1) % 290
        tokens = (*completion.token_ids[:5], wrong, *completion.token_ids[6:])
        return [replace(completion, token_ids=tokens)]

    monkeypatch.setattr(LLM, "run_all", run_all)
    result = ppsd("verify", prompts, "-n", 12, "--json", *tiny())
    record = json.loads(result.out)
    assert calls == ["autoregressive", "ppsd"] * 2
    assert result.code == 1
    assert (record["passed"], record["exact"], record["prompts"]) == (False, 1, 2)
    assert [c["divergence"] for c in record["comparisons"]] == [None, 5]
    assert [c["bitwise"] for c in record["comparisons"]] == [True, False]
    assert record["comparisons"][1]["decided_by"] > 0
    assert "b: DIFFERS at token 5, plain logits apart by " in result.err


def test_verify_names_a_prompt_that_is_too_long(ppsd, tiny, prompts) -> None:
    result = ppsd("verify", prompts, "--max-context", 6, *tiny())
    assert result.code == 1
    assert result.err.endswith("tokens\n")
    assert "ppsd: task a: prompt must be of 1 to 5 tokens" in result.err
