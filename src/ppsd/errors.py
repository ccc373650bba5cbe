"""Every error ppsd raises on purpose. Imported by all layers; imports nothing.

PpsdError
├── ConfigError            a setting is out of range (names field, value, what is allowed)
├── ModelError             a model file is missing, corrupt or refused
│   ├── UnsupportedModelError   the architecture or a feature of it is not supported
│   └── HeadError               an exit head does not fit the model, split or exit layer
├── KernelError            the compiled kernels are missing, or stages have different ones
├── InsufficientMemoryError     the estimate made before loading does not fit
├── RequestError           one request cannot go on; the pipeline takes the next
└── PipelineError          the running pipeline broke
    ├── StageLostError          a stage's process or host is gone
    ├── StageFailedError        a stage raised; carries its traceback
    ├── PipelineTimeoutError    a wait passed its deadline
    ├── ProtocolError           bytes that are not a message of this protocol
    └── NonFiniteError          NaN or infinity where logits should be
"""

from __future__ import annotations

MAX_TOLD = 300
MAX_SENTENCE = 1500


def shortened(text: str, limit: int = MAX_TOLD) -> str:
    """Return a text in one line, cut where a sentence about it would become unreadable."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[:limit] + "…"


def counted(number: int, noun: str) -> str:
    """Return a number of things as it is said of one or of several."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cause_of(error: Exception) -> str:
    """Return what went wrong, without the number and path that an OSError repeats."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class Described(str):
    """Words about a value, to be told in its place in a sentence: without quotes."""

    __repr__ = str.__str__


def _told(value: object) -> str:
    """Return a value for people; a list of numbers as it is typed."""
    if isinstance(value, tuple) and value and all(isinstance(n, int | float) for n in value):
        return ",".join(map(str, value))
    return repr(value)


class PpsdError(Exception):
    """Base of all errors below; the command line prints its text and exits with 1."""


class ConfigError(PpsdError, ValueError):
    """A setting is out of range. The text names the field, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} must be {allowed}, got {shortened(_told(value))}")
        self.field = field
        self.value = value
        self.allowed = allowed


class ModelError(PpsdError):
    """A model file is missing, corrupt or refused. The text may quote a stranger's file."""

    def __init__(self, text: str) -> None:
        bounded = len(text) <= MAX_SENTENCE and "\n" not in text
        super().__init__(text if bounded else shortened(text, MAX_SENTENCE))


class UnsupportedModelError(ModelError):
    """The model's architecture, or a feature of it, is not supported."""


class HeadError(ModelError):
    """An exit head does not fit the model, the split or the exit layer."""


class KernelError(PpsdError):
    """The compiled kernels are missing, or stages have different ones."""


class InsufficientMemoryError(PpsdError):
    """The memory estimate made before loading exceeds what is free."""


class RequestError(PpsdError):
    """A request's own settings leave it nothing to go on with; other requests are untouched."""


class PipelineError(PpsdError):
    """The running pipeline broke; the engine that raised this is closed."""


class StageLostError(PipelineError):
    """A stage's process or host is gone."""


class StageFailedError(PipelineError):
    """A stage raised an exception.

    ``remote_traceback`` is the stage's own traceback as text.
    """

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.add_note(remote_traceback)  # Python prints it below an uncaught error


class PipelineTimeoutError(PipelineError):
    """A wait passed its deadline."""


class ProtocolError(PipelineError):
    """Bytes arrived that are not a message of this protocol, or not one that may come now."""


class NonFiniteError(PipelineError):
    """NaN or infinity appeared where finite logits were expected; no token was sampled."""
