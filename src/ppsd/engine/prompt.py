"""From what a caller passes as a prompt to checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError, Described
from ppsd.model.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

KINDS = "a text, token ids or chat messages"
MESSAGE = "a mapping of texts with role and content, such as {'role': 'user', 'content': 'Hi'}"


def encode(
    prompt: Prompt,
    tokenizer: Tokenizer,
    num_tokens: int,
    max_context: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of text as it is, of ids, or of messages by the chat template.

    The template finds ``template_kwargs`` by name.

    Raises ConfigError for what is no prompt, ids beyond ``num_tokens`` and prompts without room.
    """
    if isinstance(prompt, str):
        return _fitting(tokenizer.encode(prompt), max_context)
    items = _listed(prompt, KINDS)
    if is_chat(items):
        messages = [_message(message) for message in items]
        return _fitting(tokenizer.encode_chat(messages, template_kwargs or {}), max_context)
    return check_ids(items, num_tokens, max_context)


def check_ids(prompt: object, num_tokens: int, max_context: int) -> list[int]:
    """Return a prompt of token ids; raises ConfigError for texts too, and otherwise as encode."""
    return _fitting(_ids(_listed(prompt, "token ids"), num_tokens - 1), max_context)


def several(prompt: Prompt | Sequence[Prompt]) -> Sequence[Prompt] | None:
    """Return the prompts of a list of them; None for a single prompt."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return None
    several = isinstance(prompt[0], str) or (
        isinstance(prompt[0], Sequence) and not isinstance(prompt[0], bytes)
    )
    return prompt if several else None  # type: ignore[return-value]  # as its first item shows


def is_chat(prompt: Prompt) -> bool:
    """Return True for messages, whose answer begins a text; one to text or ids continues it."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _listed(prompt: object, allowed: str) -> Sequence[Any]:
    if hasattr(prompt, "tolist") and not isinstance(prompt, memoryview):
        prompt = prompt.tolist()  # an array of NumPy or PyTorch
    texts = str | bytes | bytearray | memoryview
    if not isinstance(prompt, Sequence) or isinstance(prompt, texts):
        raise ConfigError("prompt", prompt, allowed)
    return prompt


def _fitting(ids: list[int], max_context: int) -> list[int]:
    """Return ids that leave room for an answer."""
    if not 0 < len(ids) < max_context:
        allowed = f"of 1 to {max_context - 1} tokens (the context holds {max_context})"
        raise ConfigError("prompt", Described(f"{len(ids)} tokens"), allowed)
    return ids


def _ids(prompt: Sequence[Any], most: int) -> list[int]:
    """Return checked token ids; those that are all right, as almost always, in a fraction of a ms.

    An event loop may wait for this.
    """
    if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) <= most:
        return list(prompt)
    return [checks.integer("prompt token id", token, 0, most) for token in prompt]


def _message(message: object) -> dict[str, str]:
    texts = isinstance(message, Mapping) and all(isinstance(v, str) for v in message.values())
    if not isinstance(message, Mapping) or not texts or not {"role", "content"} <= message.keys():
        raise ConfigError("message", message, MESSAGE)
    return dict(message)
