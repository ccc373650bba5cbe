"""Choose a chat template, and render it within bounds.

A template is a program that comes with a model. transformers runs it in a sandbox, which keeps it
from the machine but not from running or growing without end.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from threading import Lock
from types import FrameType, MappingProxyType
from typing import Any, TypeVar

import psutil

from ppsd.errors import ConfigError, Described, ModelError, counted, shortened

MAX_TEMPLATE = 1 << 18  # characters; the longest known have 30,000
MAX_TEXT = 1 << 22  # characters of a rendered conversation
MAX_SECONDS = 5.0  # of computing; a conversation takes milliseconds
MAX_BYTES = 1 << 29  # of growth, other threads' included
MAX_DIGITS = 8
DIGITS = re.compile(r"\d+")
LOOK_SECONDS = 0.001  # so much is filled with a few MiB
JINJA = ("{{", "{%", "{#")
COMPILED = "<template>"  # what Jinja calls the file of a template's code
COMPILING = Lock()
SEQUENCES = (str, list, tuple)
# A width and a precision, and what is a bracket in a key's brackets, where no width is found.
CONVERSION = re.compile(r"%(?:\([^()]*\))?[-+ #0]*(\*|\d*)\.?(\*|\d*)(\(?)")

T = TypeVar("T")


def choose_template(own: str | Mapping[str, str] | None, wanted: str | None, where: str) -> str:
    """Return the template to use: ``wanted``, or else the model's own default.

    ``wanted`` is the name of one of the model's own templates, a file, or Jinja text. Raises
    ConfigError when it is none of these, and ModelError when the model ``where`` has no default.
    """
    named = own if isinstance(own, Mapping) else {"default": own} if own else {}
    names = ", ".join(sorted(named))
    if wanted is not None:
        return named.get(wanted) or _given(wanted, names)
    if "default" in named:
        return named["default"]
    if named:
        raise ModelError(
            f"{where} defines several chat templates ({names}) and no default; choose one with "
            "--chat-template"
        )
    raise ModelError(f"{where} does not define a chat template; use --raw or --chat-template")


def _given(wanted: str, names: str) -> str:
    if any(mark in wanted for mark in JINJA):
        return wanted
    try:
        with open(os.path.expanduser(wanted), encoding="utf-8-sig") as file:
            return file.read(MAX_TEMPLATE + 1)
    except (OSError, ValueError) as error:
        among = f" or one of the model's own ({names})" if names else ""
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        allowed = f"Jinja text, a readable file{among}"
        raise ConfigError("chat_template", wanted, f"{allowed} ({reason})") from error


def render(
    inner: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the conversation as text, ready for the assistant's next message.

    ``inner`` is transformers' tokenizer; the template finds ``more`` by name. Raises
    ConfigError when the template refuses the conversation, fails, renders nothing, or takes more
    time or memory than any template needs.
    """
    try:
        if len(template) > MAX_TEMPLATE:
            raise ValueError(f"the template is longer than {MAX_TEMPLATE} characters")
        _refuse_large(template)
        text: str = _bounded(lambda: _applied(inner, template, messages, more))
        if not text:
            raise ValueError("it renders an empty prompt")
        if len(text) > MAX_TEXT:
            raise ValueError(f"it renders more than {MAX_TEXT} characters")
    except Exception as error:  # a template can raise whatever Python can
        told = shortened(str(error)) or type(error).__name__
        if not isinstance(error, ValueError) and not type(error).__module__.startswith("jinja2"):
            told = f"{type(error).__name__}: {told}"
        count = Described(counted(len(messages), "message"))
        allowed = f"what the model's chat template can render ({told})"
        raise ConfigError("messages", count, allowed) from error
    return text


def _applied(
    inner: Any, template: str, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> str:
    _compile(template)
    text: str = inner.apply_chat_template(
        list(messages),
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
        **more,
    )
    return text


def _compile(template: str) -> None:
    """Let transformers compile a template, which it keeps, so that steps of it are checked.

    Jinja does steps of constants already then.
    """
    from transformers.utils import chat_template_utils as theirs

    name = "ImmutableSandboxedEnvironment"
    own, compiled = getattr(theirs, name, None), getattr(theirs, "_compile_jinja_template", None)
    if own is None or compiled is None:  # another version of transformers, which has to do
        return
    with COMPILING:
        setattr(theirs, name, _sandbox())
        try:
            if not isinstance(compiled(template).environment, _sandbox()):  # kept from elsewhere
                compiled.cache_clear()
                compiled(template)
        finally:
            setattr(theirs, name, own)


@cache
def _sandbox() -> type[Any]:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses products and formats that could take more than there is in one step."""

        intercepted_binops = frozenset("*%")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                _refuse_product(left, right)
            elif isinstance(left, str):
                _refuse_format(left, right)
            return super().call_binop(context, operator, left, right)

    return Sandbox


def _refuse_product(left: Any, right: Any) -> None:
    sizes = [len(side) if isinstance(side, SEQUENCES) else side for side in (left, right)]
    if not all(isinstance(size, int) for size in sizes):
        return
    product = abs(sizes[0] * sizes[1])
    if isinstance(left, SEQUENCES) or isinstance(right, SEQUENCES):
        if product > MAX_TEXT:
            raise ValueError(f"repeating to more than {MAX_TEXT} items is not supported")
    elif product >= 10**MAX_DIGITS:
        raise ValueError(f"numbers of more than {MAX_DIGITS} digits are not supported")


def _refuse_format(text: str, values: object) -> None:
    """Raise ValueError for a format whose widths, or values again and again, are too much."""
    conversions = CONVERSION.findall(text.replace("%%", ""))
    found = [part for conversion in conversions for part in conversion if part]
    if not all(map(str.isdecimal, found)):
        raise ValueError("formats with a width among their values are not supported")
    widths = sum(int(digits[: MAX_DIGITS + 1]) for digits in found)
    if widths + len(conversions) * len(str(values)) > MAX_TEXT:
        raise ValueError(f"formats of more than {MAX_TEXT} characters are not supported")


def _refuse_large(template: str) -> None:
    """Raise ValueError for what takes hours or all memory in a step that nothing interrupts.

    That is ``a ** b``, and with large numbers padding; see ``_sandbox`` for what a number may be
    computed for.
    """
    from jinja2 import Environment

    before = ""
    for _, kind, value in Environment().lex(template):
        if value == "**" and kind == "operator" and before not in ("(", ","):  # f(**arguments)
            raise ValueError("powers are not supported")
        digits = max(map(len, DIGITS.findall(value)), default=0)
        if kind in ("integer", "float", "string") and digits > MAX_DIGITS:
            raise ValueError(f"numbers of more than {MAX_DIGITS} digits are not supported")
        if kind != "whitespace":
            before = value


def _bounded(call: Callable[[], T]) -> T:
    """Call a function that ends with an error once it exceeds its bounds.

    Its memory is looked at after each of a template's steps that takes a while, as growing does. No
    limit of the operating system would do: each holds for the whole process, and would fail other
    threads' work. So a single step may still ask for more than there is, which ``_refuse_large``
    and ``_sandbox`` are for.
    """
    end = time.thread_time() + MAX_SECONDS
    process = psutil.Process()
    most = process.memory_info().rss + MAX_BYTES
    looked = time.thread_time()

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal looked
        now = time.thread_time()
        if now > end:
            raise TimeoutError(f"it takes more than {MAX_SECONDS:g} seconds")
        if now - looked > LOOK_SECONDS:
            looked = now
            if process.memory_info().rss > most:
                raise MemoryError(f"it takes more than {MAX_BYTES >> 20} MiB")
        return watch if frame.f_code.co_filename == COMPILED else None  # else calls are enough

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return call()
    finally:
        sys.settrace(before)
