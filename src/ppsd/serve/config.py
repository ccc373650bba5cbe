"""The settings of the server itself, which are flags of ``ppsd serve``."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ppsd import checks
from ppsd.errors import ConfigError
from ppsd.settings import setting

KEY = re.compile("[\x20-\x7e]+")  # what a header's value can hold
PREFIX = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")


@dataclass(frozen=True)
class ServerConfig:
    """Say where to listen, who may ask, and how many may wait.

    What the machine has to have for it is checked where it is used: other ranks need none of it.
    """

    host: str = setting("Address to listen on.", "127.0.0.1", metavar="ADDRESS")
    port: int = setting("Port to listen on; 0 takes a free one.", 8000)
    api_key: str | None = setting(
        "Key that clients must send; other users of the machine can read it here.",
        None,
        metavar="KEY",
    )
    api_key_file: str | None = setting("File that holds the key.", None, metavar="FILE")
    insecure: bool = setting("Listen on an address that others reach, without a key.", False)
    served_model_name: tuple[str, ...] = setting(
        "Name of the model for clients, in place of its own; may be repeated.",
        (),
        metavar="NAME",
        repeated=True,
    )
    max_queue: int = setting("Choices that may wait for those under way; more are refused.", 256)
    drain_timeout: float = setting("Seconds that running requests have at the end.", 30.0)
    metrics_prefix: str = setting(
        "Beginning of the names at /metrics; vllm: suits ready dashboards.",
        "ppsd:",
        metavar="PREFIX",
    )
    log_format: str = setting("Form of the lines on standard error: text or json.", "text")
    ssl_certfile: str | None = setting("Certificate for TLS.", None, metavar="FILE")
    ssl_keyfile: str | None = setting("Private key of the certificate.", None, metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("host", "metrics_prefix", "log_format"):
            checks.string(name, getattr(self, name))
        for name in ("api_key", "api_key_file", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) is not None:
                checks.string(name, getattr(self, name))
        checks.truth("insecure", self.insecure)
        self._check_names()
        checks.one_of("log_format", self.log_format, ("text", "json"))
        checks.integer("port", self.port, 0, 65535)
        checks.integer("max_queue", self.max_queue, 0, 1_000_000)
        checks.number("drain_timeout", self.drain_timeout, 0.0, 86400.0)
        if self.api_key is not None and self.api_key_file is not None:
            raise ConfigError("api_key_file", self.api_key_file, "left out beside --api-key")
        if self.api_key is not None:
            object.__setattr__(self, "api_key", self.api_key.strip())  # as headers arrive
            if not KEY.fullmatch(self.api_key):
                raise ConfigError("api_key", "…", "printable ASCII text in one line, not empty")
        if not PREFIX.fullmatch(self.metrics_prefix):
            raise ConfigError("metrics_prefix", self.metrics_prefix, "letters, digits, _ and :")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("ssl_keyfile", self.ssl_keyfile, "used with --ssl-certfile")

    def _check_names(self) -> None:
        names = self.served_model_name
        several = (names,) if isinstance(names, str) else names
        for name in checks.items("served_model_name", several, "a text or several"):
            if not checks.string("served_model_name", name):
                raise ConfigError("served_model_name", name, "a non-empty text")
        object.__setattr__(self, "served_model_name", tuple(several))

    @property
    def only_local(self) -> bool:
        """Return True if all who ask have to be on this machine, as no key is asked for."""
        return self.api_key is None and self.api_key_file is None and not self.insecure

    def with_key(self) -> ServerConfig:
        """Return the settings with the key that the file holds, if one is named."""
        if self.api_key_file is None:
            return self
        try:
            key = Path(self.api_key_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
            raise ConfigError(
                "api_key_file", self.api_key_file, f"a readable file ({reason})"
            ) from error
        if not KEY.fullmatch(key):
            allowed = "a file with a key in it, printable ASCII text in one line"
            raise ConfigError("api_key_file", self.api_key_file, allowed)
        return replace(self, api_key=key, api_key_file=None)


def is_loopback(host: str) -> bool:
    """Return True for a name or address that only this machine reaches itself by."""
    with suppress(ValueError):  # it is a name
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
