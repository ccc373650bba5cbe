"""Options that several verbs share, as dataclasses whose fields become flags.

Nothing here imports PyTorch: ``ppsd --help`` must be instant.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.types import SamplingParams

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
PIPELINE = "Pipeline"
SAMPLING = "Sampling"


def flag(help_text: str, *names: str, panel: str, **limits: Any) -> Any:
    """A command-line option shown in the given panel of --help."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **limits)


TEMPLATE_HELP = (
    "Chat template in place of the model's: a file, Jinja text, or the name of one that it has."
)

_pipeline = functools.partial(flag, panel=PIPELINE)
_sampling = functools.partial(flag, panel=SAMPLING)


@dataclass
class PipelineOptions:
    """What runs where: the fields of EngineConfig as text."""

    model: Annotated[
        str | None,
        _pipeline("Directory, .gguf file or hub id; the embedded SmolLM2-135M if left out.", "-m",
                  "--model"),
    ] = None  # fmt: skip
    chat_template: Annotated[
        str | None,
        _pipeline(TEMPLATE_HELP, metavar="FILE|TEXT"),
    ] = None
    stages: Annotated[int, _pipeline("Number of stages.")] = 2
    split: Annotated[
        str | None, _pipeline("Layers at which later stages begin, such as 8,16.", metavar="L,…")
    ] = None
    exit_layer: Annotated[
        int | None, _pipeline("Layer the exit head reads; the end of stage 0.")
    ] = None
    head: Annotated[
        str,
        _pipeline("Exit head: a name of `ppsd heads list` or a directory, auto (the best found), "
                  "lookup (repeat earlier text), untrained or none.", metavar="HEAD"),
    ] = "auto"  # fmt: skip
    force_head: Annotated[
        bool,
        _pipeline("Use the head's directory though it was trained on another model; the output "
                  "stays exact.", "--force-head"),
    ] = False  # fmt: skip
    mode: Annotated[
        str,
        _pipeline("auto, autoregressive, draft-then-verify or ppsd.", metavar="MODE"),
    ] = "auto"
    block: Annotated[int | None, _pipeline("Tokens that travel together (m); set by the mode.")] = (
        None
    )
    in_flight: Annotated[
        int | None, _pipeline("Blocks in the pipeline at once (w); set by the mode.")
    ] = None
    plan: Annotated[
        str,
        _pipeline("What decides the rest: auto, off, or a file of `ppsd profile`.",
                  metavar="PLAN"),
    ] = "auto"  # fmt: skip
    acceptance: Annotated[
        str, _pipeline("coupled (same tokens as plain decoding) or rejection.", metavar="RULE")
    ] = "coupled"
    dtype: Annotated[
        str, _pipeline("auto, float64, float32, bfloat16 or float16.", metavar="DTYPE")
    ] = "auto"
    devices: Annotated[
        str, _pipeline("One device, or one a stage: cpu or cuda:0,cuda:1.", metavar="D,…")
    ] = "cpu"
    threads_per_stage: Annotated[
        int, _pipeline("CPU threads a stage; 0 shares the cores evenly.")
    ] = 0
    transport: Annotated[
        str,
        _pipeline("auto, shared-memory, distributed or inprocess.", metavar="KIND"),
    ] = "auto"
    max_context: Annotated[
        int | None, _pipeline("Positions the cache holds; the model's, at most 8192.")
    ] = None
    prefill_chunk: Annotated[int, _pipeline("Prompt tokens that travel together.")] = 128
    pace: Annotated[
        str | None,
        _pipeline("Emulate devices: seconds a stage takes for a block, one or one a stage.",
                  metavar="S,…"),
    ] = None  # fmt: skip
    lookup: Annotated[
        bool, _pipeline("Let drafts repeat earlier text.", "--lookup/--no-lookup")
    ] = True
    gate: Annotated[
        bool, _pipeline("Pause speculation while it does not pay.", "--gate/--no-gate")
    ] = True
    escape_special: Annotated[
        bool,
        _pipeline("Take control tokens in prompts and messages for plain text.",
                  "--escape-special"),
    ] = False  # fmt: skip
    timeout: Annotated[float, _pipeline("Seconds to wait for a stage.")] = 60.0
    init_timeout: Annotated[float, _pipeline("Seconds to wait for loading and joining.")] = 300.0

    def settings(self) -> dict[str, Any]:
        """Keyword arguments for ``LLM``."""
        from ppsd.model.head_library import head_directory

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        split = None if self.split is None else integers("split", self.split)
        pace = numbers("pace", self.pace or "")
        changed = {"split": split, "devices": tuple(self.devices.split(",")), "pace": pace}
        return fields | changed | {"head": str(head_directory(self.head))}


@dataclass
class SamplingOptions:
    """How tokens are chosen: the fields of SamplingParams as text.

    None: as the model's file asks (model/defaults.py), or neutral.
    """

    temperature: Annotated[
        float | None,
        _sampling("0 is greedy; this and the next four are the model's own if left out.", "-t",
                  "--temperature"),
    ] = None  # fmt: skip
    top_k: Annotated[int | None, _sampling("Keep the k most likely tokens; 0 keeps all.")] = None
    top_p: Annotated[float | None, _sampling("Keep the smallest set of this probability.")] = None
    min_p: Annotated[float | None, _sampling("Drop tokens below this share of the best one's.")] = (
        None
    )
    repetition_penalty: Annotated[float | None, _sampling("Above 1 discourages repetition.")] = None
    presence_penalty: Annotated[float, _sampling("Subtracted once for a token used.")] = 0.0
    frequency_penalty: Annotated[float, _sampling("Subtracted for every use.")] = 0.0
    logit_bias: Annotated[
        str | None, _sampling("Added to logits, such as 42:-100,7:2.5.", metavar="ID:BIAS,…")
    ] = None
    seed: Annotated[int, _sampling("Noise is a function of seed and position.")] = 0
    stop: Annotated[
        list[str] | None, _sampling("Text that ends the output; may be repeated.", metavar="TEXT")
    ] = None
    stop_token_ids: Annotated[
        str | None, _sampling("Token ids that end the output.", metavar="ID,…")
    ] = None
    ignore_eos: Annotated[
        bool, _sampling("Go on after end-of-sequence tokens.", "--ignore-eos")
    ] = False
    max_tokens: Annotated[
        int | None,
        _sampling("At most so many new tokens; 256 if left out, in chat what the context holds.",
                  "-n", "--max-tokens"),
    ] = None  # fmt: skip
    min_tokens: Annotated[int, _sampling("No end before so many new tokens.")] = 0

    def params(self, defaults: Mapping[str, Any] | None = None) -> SamplingParams:
        """Return the checked SamplingParams; ``defaults`` are for fields that no flag gave."""
        from ppsd.types import SamplingParams

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {name: value for name, value in fields.items() if value is not None}
        given |= {"stop": tuple(self.stop or ())}
        given |= {"stop_token_ids": integers("stop_token_ids", self.stop_token_ids or "")}
        given |= {"logit_bias": pairs("logit_bias", self.logit_bias or "", "id:bias")}
        return SamplingParams(**{**(defaults or {}), **given})


def integers(name: str, text: str) -> tuple[int, ...]:
    """Read ``4,8,15``; raises ConfigError naming the option."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(name, text, "integers separated by commas") from None


def numbers(name: str, text: str) -> tuple[float, ...]:
    """Read ``0.06,0.08``; raises ConfigError naming the option."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise ConfigError(name, text, "numbers separated by commas") from None


def pairs(name: str, text: str, what: str) -> dict[int, float]:
    """Read ``8:0.5,15:0.6``; raises ConfigError naming the option, and ``what`` a pair is."""
    try:
        parts = [part.split(":") for part in text.split(",") if part]
        return {int(key): float(value) for key, value in parts}
    except ValueError:
        raise ConfigError(name, text, f"{what} pairs separated by commas") from None


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Let a verb take option dataclasses as parameters; their fields become its flags."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters = [
        expanded
        for name, parameter in inspect.signature(verb).parameters.items()
        for expanded in _expand(parameter.replace(annotation=hints[name]), groups.get(name))
    ]

    @functools.wraps(verb)
    def wrapper(**flags: Any) -> None:
        arguments = {
            name: group(**{f.name: flags.pop(f.name) for f in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        with _interruptible():
            verb(**flags, **arguments)

    signature = inspect.Signature(parameters)
    wrapper.__signature__ = signature  # type: ignore[attr-defined]  # typeshed lacks it
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the verb with 130 and no words.

    Extensions that call back into Python may turn KeyboardInterrupt into an error of their own
    (safetensors: ValueError), so that the signal is noted apart from the exception.
    """
    pressed = False

    def press(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        print(file=sys.stderr)  # what comes next starts below the ^C
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _expand(parameter: inspect.Parameter, group: Any) -> Sequence[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    if group is None:
        return [parameter.replace(kind=keyword)]
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, keyword, default=_default(f), annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    """A flag without a default must be given."""
    missing = field.default is dataclasses.MISSING
    return inspect.Parameter.empty if missing else field.default
