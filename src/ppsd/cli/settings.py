"""Make flags of the records of settings; variables ``PPSD_*`` and a TOML file set them as well.

A flag comes before the environment, that before the file, and that before the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ppsd.cli.flags import integers, numbers, pairs
from ppsd.config import Decoding, EngineConfig, Placement
from ppsd.errors import ConfigError, PpsdError
from ppsd.serve.config import ServerConfig
from ppsd.types import SamplingParams

PREFIX = "PPSD_"
GIVEN = "ppsd.given"  # the origins of a verb's settings, in its context
SECRET = "api_key"
CONFIG_FILE, FILE_VARIABLE = "config_file", f"{PREFIX}CONFIG"
EXPERTS = "For experts"
# What Kubernetes tells every pod of a Service whose name is ppsd, or begins with ppsd-.
SERVICE = re.compile(rf"{PREFIX}(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
ADDRESS = re.compile("(tcp|udp|sctp)://.*")  # in PPSD_PORT, which is a setting, too
TRUTHS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(
    ("0", "false", "no", "off"), False
)
PANELS = {
    Placement: "Placement",
    Decoding: "Decoding",
    SamplingParams: "Sampling",
    ServerConfig: "Server",
}
AMBIENT = (EngineConfig, SamplingParams, ServerConfig)  # the environment and a file set them, too
FILE_HELP = "TOML file of settings; flags and variables PPSD_… come first."


@dataclass(frozen=True)
class Only:
    """Offer these settings of a record; the others keep their defaults."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Without:
    """Offer all settings of a record but these."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Otherwise:
    """Give settings of a record other defaults than its own."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Remember where a setting was given, and as what."""

    place: str
    value: Any


Origins = dict[str, Origin]  # by setting; a verb's parameter of this type holds those given


@dataclass(frozen=True)
class Sampling:
    """Hold the sampling settings that were given; the model's file or a verb may set others."""

    origins: Mapping[str, Origin]

    @property
    def given(self) -> dict[str, Any]:
        """Return the values by name."""
        return {name: origin.value for name, origin in self.origins.items()}

    def params(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Return the checked SamplingParams; ``defaults`` are for settings that nobody gave."""
        with named(self.origins):
            return SamplingParams(**{**(defaults or {}), **self.given})


def settings_of(record: Any) -> dict[str, Field[Any]]:
    """Return the fields of a record that are flags, by name."""
    return {f.name: f for f in dataclasses.fields(record) if "help" in f.metadata}


ALL = {name: field for record in AMBIENT for name, field in settings_of(record).items()}


class Group:
    """Make flags of a verb's parameter that is a record of settings, and the record of flags."""

    def __init__(self, hint: Any) -> None:
        annotated = get_args(hint)
        self._made = annotated[0] if annotated else hint
        self._record = SamplingParams if self._made is Sampling else self._made
        fields = settings_of(self._record)
        self._defaults: Mapping[str, Any] = {}
        for choice in annotated[1:]:
            if isinstance(choice, Only):
                fields = {name: fields[name] for name in choice.names}
            elif isinstance(choice, Without):
                fields = {name: f for name, f in fields.items() if name not in choice.names}
            elif isinstance(choice, Otherwise):
                self._defaults = choice.values
        self._fields = fields

    @staticmethod
    def suits(hint: Any) -> bool:
        """Return True if a parameter of this type is a group of settings."""
        kind = (get_args(hint) or (hint,))[0]
        return kind is Sampling or (dataclasses.is_dataclass(kind) and bool(settings_of(kind)))

    @property
    def ambient(self) -> bool:
        """Return True if the environment and a file set these settings as well."""
        return self._record in AMBIENT

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """Return the flags as parameters that typer reads."""
        hints = get_type_hints(self._record)
        defaults = self._defaults
        return [
            _parameter(f, hints[name], self._panel(f), defaults.get(name, f.default))
            for name, f in self._fields.items()
        ]

    def _panel(self, field: Field[Any]) -> str:
        if field.metadata["expert"]:
            return EXPERTS
        if panel := field.metadata["panel"]:
            return str(panel)
        return next(panel for part, panel in PANELS.items() if field.name in settings_of(part))

    def take(self, ctx: typer.Context, flags: dict[str, Any], file: Mapping[str, Any]) -> Any:
        """Return the record of what was given, and remove its flags from ``flags``."""
        origins, hints = {}, get_type_hints(self._record)
        for name, field in self._fields.items():
            ambient = file if self.ambient else None
            if origin := _given(ctx, field, hints[name], flags.pop(name), ambient):
                origins[name] = origin
        ctx.meta.setdefault(GIVEN, {}).update(origins)
        if self._made is Sampling:
            return Sampling(origins)
        with named(origins):
            given = {name: origin.value for name, origin in origins.items()}
            made = self._made(**{**self._defaults, **given})
            if {"stages", "split"} <= origins.keys():
                made.check_stages(origins["stages"].value)
            return made


def _parameter(field: Field[Any], hint: Any, panel: str, default: Any) -> inspect.Parameter:
    """Return a flag for a field, with its name, help and default."""
    about = field.metadata
    kind, flag = hint, _dashed(field)
    names = [about["short"], flag] if about["short"] else [flag]
    if about["repeated"]:
        kind, default = list[str] | None, None
    elif _reader(hint) is not None:
        kind, given, default = str | None, default, None
        if given is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kind, default = str, inspect.Parameter.empty
        elif isinstance(given, tuple) and given:
            default = ",".join(map(str, given))
        elif isinstance(given, int):
            default = str(given)
    elif hint is bool and field.default:
        names = [f"{flag}/--no-{flag.removeprefix('--')}"]
    option = typer.Option(
        *names,
        help=about["help"],
        metavar=about["metavar"],
        rich_help_panel=panel,
        show_default=not about["open_default"],
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


def _dashed(field: Field[Any]) -> str:
    """Return the long name of a field's flag."""
    return str(field.metadata["flag"] or "--" + field.name.replace("_", "-"))


def _variable(name: str) -> str:
    return PREFIX + name.upper()


@functools.cache
def _reader(hint: Any) -> Callable[[str, str], Any] | None:
    """Return how to read the text of a setting of no simple type, None for others."""
    if hint == int | str:
        return lambda name, text: int(text) if text.isdecimal() else text
    for kind in (hint, *get_args(hint)):
        if kind == tuple[int, ...]:
            return integers
        if kind == tuple[float, ...]:
            return numbers
        if kind == tuple[str, ...]:
            return lambda name, text: tuple(text.split(","))
        if kind == Mapping[int, float]:
            return lambda name, text: pairs(name, text, "id:bias")
    return None


def _given(
    ctx: typer.Context, field: Field[Any], hint: Any, value: Any, file: Mapping[str, Any] | None
) -> Origin | None:
    """Return what was given for a setting, and where; None if nothing was.

    Without a ``file`` only the command line counts.
    """
    name, repeated = field.name, field.metadata["repeated"]
    source = ctx.get_parameter_source(name)
    told = _dashed(field).removeprefix("--").replace("-", "_")  # in errors
    if source is not None and source.name == "COMMANDLINE":
        return Origin("", tuple(value) if repeated else _from_text(told, hint, value))
    if file is None:
        return None
    if text := _variables().get(_variable(name)):
        return Origin(_variable(name), (text,) if repeated else _from_text(name, hint, text))
    if name in file:
        return Origin(str(ctx.params[CONFIG_FILE]), _from_toml(name, file[name]))
    return None


def _from_text(name: str, hint: Any, value: Any) -> Any:
    """Return a value as the record takes it; the record refuses what stays a text.

    What comes from the command line is a number or bool already, unless its flag takes a list.
    """
    if not isinstance(value, str):
        return value
    if reader := _reader(hint):
        return reader(name, value)
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        return TRUTHS.get(value.lower(), value)
    for kind in (int, float):
        if kind in kinds:
            with suppress(ValueError):  # no number is refused where its setting is checked
                return kind(value)
    return value


def _from_toml(name: str, value: Any) -> Any:
    """Return a value as the record takes it: TOML has lists, and keys that are texts."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    if name != "logit_bias":
        raise ConfigError(name, value, "a value or a list, no table")
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ConfigError(name, value, "a table of token ids and numbers") from None


def as_toml(records: Iterable[Any], origins: Origins) -> str:
    """Return settings as a TOML file, with where each was given; those without a value as comments.

    The key is not told.
    """
    lines = []
    for record in records:
        for name in settings_of(record):
            value, origin = getattr(record, name), origins.get(name)
            text = f"{name} = {_toml(value)}"
            if value is None or name == SECRET:
                text = f"# {name}"
            lines.append(text if origin is None else f"{text}  # {origin.place or 'flag'}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)  # TOML spells these as JSON does


@contextmanager
def named(origins: Mapping[str, Origin]) -> Iterator[None]:
    """Note with a refused setting where it was given, unless that was the command line.

    So also of those it is refused for, which the sentence names.
    """
    try:
        yield
    except ConfigError as error:
        told = re.findall(r"\w+", f"{error.field} {error.allowed}")
        for name, origin in origins.items():
            if origin.place and name in told:
                error.add_note(f"{name} is set by {origin.place}")
        raise


def check_environment() -> None:
    """Refuse a variable that is none, as a misspelt one would be ignored; raises PpsdError."""
    from ppsd.cli.env import VARIABLES

    known = [name.removeprefix(PREFIX) for name in (*map(_variable, ALL), *VARIABLES)]
    for name in _variables():
        if (own := name.removeprefix(PREFIX)) not in known:
            raise PpsdError(f"unknown variable {name}{_near(own, known, PREFIX)}")


def _variables() -> dict[str, str]:
    """Return the variables ``PPSD_*`` without those that Kubernetes sets."""
    return {
        name: text
        for name, text in os.environ.items()
        if name.startswith(PREFIX)
        and not SERVICE.fullmatch(name)
        and not (name.endswith("PORT") and ADDRESS.fullmatch(text))
    }


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # letters are swapped most easily
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def file_parameter() -> inspect.Parameter:
    """Return the flag ``--config``."""
    option = typer.Option(
        "--config", help=FILE_HELP, metavar="FILE", envvar=FILE_VARIABLE, show_envvar=False
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    kind = Annotated[Path | None, option]
    return inspect.Parameter(CONFIG_FILE, keyword, default=None, annotation=kind)


def read_file(path: Path | None) -> dict[str, Any]:
    """Read a TOML file of settings; raises PpsdError for what is none."""
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise PpsdError(f"cannot read settings from {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise PpsdError(f"{path} is not a TOML file: {error}") from error
    for name in values:
        if name not in ALL:
            near = _near(name.replace("-", "_"), ALL)
            raise PpsdError(f"{path}: unknown setting {name!r}{near}")
    return values
