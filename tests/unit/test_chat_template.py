"""Chat templates: every failure is one sentence, and none runs or grows without end."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ppsd.errors import ConfigError, ModelError
from ppsd.model import chat_template
from ppsd.model.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "secret words"}, {"role": "assistant", "content": "b"}]


def tokenizer(templates: Any, wanted: str | None = None) -> Tokenizer:
    backend = Backend(models.BPE({chr(code): code for code in range(128)}, []))
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=templates)
    return Tokenizer(inner, "the-model", wanted)


def rendered(templates: Any, wanted: str | None = None) -> str:
    return "".join(map(chr, tokenizer(templates, wanted).encode_chat(MESSAGES)))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'].index('[') }}", "substring not found"),
        ("{{ 1 // (messages|length - 2) }}", "ZeroDivisionError: integer division or modulo"),
        ("{% for i in range(200000) %}{% endfor %}x", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('roles must\n alternate') }}", "(roles must alternate)"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{% if %}", "Expected an expression"),
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate str"),
        ("{{ ''.join(messages) }}", "TypeError: sequence item 0"),
        ("{% if false %}x{% endif %}", "it renders an empty prompt"),
        ("{{ 10 ** 10 ** 10 }}", "powers are not supported"),
        ("x" * (chat_template.MAX_TEMPLATE + 1), "longer than 262144 characters"),
        ("{{ '\ud800' }}", "lone surrogates"),
    ],
    ids=range(13),
)
def test_every_failure_is_one_sentence_without_the_messages(template: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(template)
    told = str(caught.value)
    assert reason in told
    assert "\n" not in told
    assert "secret words" not in told
    assert len(told) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}x",
        "{% macro f(n) %}{% for i in range(9999) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}"
        "{% endmacro %}{{ f(9) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    before = sys.gettrace()
    with pytest.raises(ConfigError, match=r"messages must be .* takes more than 0.2 seconds"):
        rendered(template)
    assert sys.gettrace() is before


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10000000000 }}", "numbers of more than 8 digits"),
        ("{{ '%999999999999d' % 1 }}", "numbers of more than 8 digits"),
        ("{{ 'x'|center(10000000000) }}", "numbers of more than 8 digits"),
        ("{% set x = 'x' * (99999999 * 25) %}x", "numbers of more than 8 digits"),
        ("{% set x = 'x' * 99999999 * 25 %}x", "repeating to more than 4194304 items"),
        ("{% set n = 9999999 %}{% set x = n * ['x'] %}x", "repeating to more than 4194304 items"),
        ("{% set x = '%*d' % (99999999, 1) %}x", "formats with a width among their values"),
        ("{% set x = '%(a(b)c)9999999d' % {} %}x", "formats with a width among their values"),
        ("{% set x = '%.9999999f' % 1 %}x", "formats of more than 4194304 characters"),
        ("{% set x = '%s' * 9999 % ('x' * 9999) %}x", "formats of more than 4194304 characters"),
        (
            "{% set s = namespace(t='xx') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}"
            "{% endfor %}{{ s.t }}",
            "MemoryError: it takes more than 512 MiB",
        ),
    ],
)
def test_a_template_cannot_fill_the_memory(template: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"messages must be .*{reason}"):
        rendered(template)


def test_products_and_formats_of_templates_work() -> None:
    texts = "{{ '-' * 3 }}{{ ['a', 'b'] * 2 }}{{ 2 * 'x' }}{{ 1.5 * 2 }}{{ 17 % 5 }}"
    assert rendered(texts) == "---['a', 'b', 'a', 'b']xx3.02"
    texts = "{{ '**%s** 20240101 %5.1f%% (%(a)3d)' | replace('%(a)', '%') % ('x', 2.25, 7) }}"
    assert rendered(texts) == "**x** 20240101   2.2% (  7)"
    assert rendered("{{ '%(a)s %(b)04d' % {'a': 'x', 'b': 7} }}") == "x 0007"


def test_a_template_that_transformers_has_compiled_already_is_bounded_too() -> None:
    template, inner = "{% set n = 99999 %}{{ 'x' * n * n }}", tokenizer(None)._inner
    assert chat_template_utils._compile_jinja_template(template)
    with pytest.raises(ConfigError, match="repeating to more than 4194304 items"):
        chat_template.render(inner, template, MESSAGES)
    again = chat_template_utils.ImmutableSandboxedEnvironment
    assert again is ImmutableSandboxedEnvironment, "others' templates are as they were"


def test_other_threads_keep_their_memory_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """They allocate what a limit of the process would not let them have."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
    begun, sizes = threading.Event(), list[int]()

    def allocate() -> None:
        begun.wait(10)
        sizes.append(torch.empty(2 * chat_template.MAX_BYTES, dtype=torch.uint8).numel())

    thread = threading.Thread(target=allocate)
    thread.start()
    begun.set()
    with pytest.raises(ConfigError, match="takes more than 1 seconds"):
        rendered(endless)
    thread.join()
    assert sizes == [2 * chat_template.MAX_BYTES]


def test_long_renderings_are_named() -> None:
    with pytest.raises(ConfigError, match="it renders more than 4194304 characters"):
        rendered("{{ 'x' * 3000000 }}{{ 'x' * 3000000 }}")


def test_keyword_arguments_and_bold_text_are_no_powers() -> None:
    template = "**{% macro f(a) %}{{ a }}{% endmacro %}{{ f(**{'a': '**'}) }}{{ dict(a=1, **{}) }}"
    assert rendered(template) == "****{'a': 1}"


SEVERAL = {"rag": "R{{ messages|length }}", "tool_use": "T"}


def test_several_templates_need_a_default_or_a_choice() -> None:
    with pytest.raises(ModelError, match=r"the-model defines several chat templates \(rag, tool_u"):
        rendered(SEVERAL)
    assert rendered(SEVERAL | {"default": "D"}) == "D"
    assert rendered(SEVERAL, "rag") == "R2"
    assert rendered(SEVERAL, "{{ messages[1].content }}") == "b"


def test_a_given_template_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages|length }}é", encoding="utf-8")
    assert rendered(None, str(file)) == "2"  # the tiny vocabulary has no é
    file.write_text("{{ 1 }}", encoding="utf-8-sig")
    assert chat_template._given(str(file), "") == "{{ 1 }}", "without the mark of an editor"
    file.write_bytes(b"\xff{{")
    with pytest.raises(ConfigError, match="chat_template must be Jinja text, a readable file"):
        tokenizer(None, str(file))


@pytest.mark.parametrize("wanted", ["no-such-name", "", "/", "x\0y", "n" * 5000])
def test_what_is_no_template_is_refused_at_once(wanted: str) -> None:
    with pytest.raises(
        ConfigError, match=r"chat_template must be .* one of the model's own \(rag, "
    ):
        tokenizer(SEVERAL, wanted)
