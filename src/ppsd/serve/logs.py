"""Log one line for each request, without its text, and what others have to say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ppsd.errors import shortened

LEFT = 499  # the client did, while its request was read
LOG = logging.getLogger("ppsd.serve")


def log_request(about: Mapping[str, Any]) -> None:
    """Log a request that is over; an ``id`` comes first."""
    LOG.info(" ".join(_told(*each) for each in about.items()), extra={"request": dict(about)})


def log_notice(text: str, style: str | None = None) -> None:
    """Log what would be printed in this style where nobody reads the log by program."""
    LOG.log(logging.WARNING if style == "yellow" else logging.INFO, "%s", text)


def log_refusal(scope: Mapping[str, Any], status: int) -> None:
    """Log a request whose answer is an error, unless ``log_request`` does; its path is quoted."""
    if status < 400 or scope["state"].get("logged"):
        return
    log_request(
        {
            "request_id": scope["state"]["request_id"],
            "method": scope["method"],
            "path": shortened(quote(scope["path"])),
            "status": status,
            "finish": "abort" if status == LEFT else "refused",
        }
    )


def _told(name: str, value: object) -> str:
    if name == "id":
        return str(value)
    return f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}"


class JsonFormatter(logging.Formatter):
    """Writes a line as a JSON object, that of a request with its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        at = datetime.fromtimestamp(record.created, UTC)
        line = {"time": at.isoformat(timespec="milliseconds"), "level": record.levelname}
        request = getattr(record, "request", None)
        line |= {"message": record.getMessage()} if request is None else request
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(form: str) -> None:
    """Send the server's lines, and others' warnings, to standard error."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    LOG.setLevel(logging.INFO)
