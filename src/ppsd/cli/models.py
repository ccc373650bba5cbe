"""``ppsd models``: what can be given to --model here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from ppsd.cli.display import list_console, log_console, size
from ppsd.errors import ConfigError

if TYPE_CHECKING:
    from ppsd.model.catalog import FoundModel

NO_MODELS = """no model is here; give --model a directory, a .gguf file or a hub id
such as {example}"""


def models(
    directory: Annotated[
        Path, typer.Argument(help="Look for local models here and two levels below.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the models that can be used here: embedded, local, and in the hub's cache."""
    if not directory.is_dir():
        raise ConfigError("directory", str(directory), "a directory that exists")
    from ppsd.model.catalog import find_models
    from ppsd.model.source import DEFAULT_HUB_ID

    found = list(find_models(directory))
    if as_json:
        print(json.dumps([_row(model) for model in found], indent=1))
        return
    usable = [model for model in found if not model.problem]
    if usable:
        list_console().print(_table(usable))
    else:
        print(NO_MODELS.format(example=DEFAULT_HUB_ID))
    for model in found:
        if model.problem:
            log_console().print(f"not usable: {model.problem}", style="dim")


def _row(model: FoundModel) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model.name,
        "title": model.title,
        "source": model.source,
        "path": str(model.path),
        "bytes": model.size,
    }
    if model.problem:
        return row | {"problem": model.problem}
    return row | {"architecture": model.architecture, "layers": model.layers}


def _table(models: list[FoundModel]) -> Table:
    table = Table(
        Column("--model", overflow="fold"),  # a cut name could not be used
        Column("kind", no_wrap=True),
        Column("layers", justify="right", no_wrap=True),
        Column("size", justify="right", no_wrap=True),
        Column("from", no_wrap=True),
        box=None,
        pad_edge=False,
    )
    for model in models:
        name = model.title if model.name else f"{model.title} (the default)"
        cells = (model.architecture, str(model.layers), size(model.size), model.source)
        table.add_row(name, *cells)
    return table
