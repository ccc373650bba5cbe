"""Log one line for each request, without its text, and what others have to say."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LOG = logging.getLogger("ppsd.serve")


def log_request(about: Mapping[str, Any]) -> None:
    """Log a request that is over; its ``id`` comes first."""
    LOG.info(" ".join(_told(*each) for each in about.items()), extra={"request": dict(about)})


def log_notice(text: str, style: str | None = None) -> None:
    """Log what would be printed in this style where nobody reads the log by program."""
    LOG.log(logging.WARNING if style == "yellow" else logging.INFO, "%s", text)


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
