"""How a request is refused: OpenAI's error object, naming the field."""

from __future__ import annotations

import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import ValidationError

from ppsd.errors import ConfigError, shortened

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

MAX_QUOTED = 80  # characters
QUOTE = reprlib.Repr()  # does not write a list of millions out only to cut it
QUOTE.maxlist = QUOTE.maxdict = MAX_QUOTED // len("0, ") + 1
QUOTE.maxstring = QUOTE.maxlong = sys.maxsize


class RefusedError(Exception):
    """A request that is not answered; becomes OpenAI's error object."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = KINDS.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def refusal_of_body(error: ValidationError, known: Iterable[str]) -> RefusedError:
    """Return the refusal that tells the first of pydantic's errors."""
    first = error.errors(include_url=False)[0]
    where = [part for part in first["loc"] if part != "[key]"]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where).lstrip(".")
    message = first["msg"]
    if first["type"] == "json_invalid":
        return RefusedError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return RefusedError(400, f"unknown field {shortened(param)}{hint}", param)
    if not where:  # a rule about several fields, or a body that is no object
        name = message.split()[0]
        known_name = name if name in set(known) else None
        return RefusedError(400, message if known_name else f"the body: {message}", known_name)
    if first["type"] != "ppsd":
        message = f"is wrong: {message}"
        if first["type"] != "missing":
            message += f", got {shortened(QUOTE.repr(first['input']), MAX_QUOTED)}"
    return RefusedError(400, f"{param} {message}", param)


def refusal_of(error: ConfigError, names: Callable[[str], str] = str) -> RefusedError:
    """Return the refusal of what the engine's own checks found."""
    field = error.field.split()[0]
    param = names(field)
    text = str(error)
    if text.startswith(f"{field} must"):  # the sentence begins with the name that they know
        text = param + text.removeprefix(field)
    long = "(the context holds" in error.allowed and error.value != "0 tokens"
    code = "context_length_exceeded" if long else None
    return RefusedError(400, text, param, code)
