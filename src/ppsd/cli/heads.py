"""``ppsd heads``: which exit heads there are, and what one of them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from ppsd.cli.streams import visible

if TYPE_CHECKING:
    from ppsd.model.head_library import FoundHead

app = typer.Typer(help="List and inspect exit heads.", no_args_is_help=True)


@app.command("list")
def list_heads(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the heads shipped with ppsd and those in $PPSD_HEADS (else ~/.cache/ppsd/heads)."""
    from ppsd.model.head_library import find_heads, local_root

    heads = find_heads()
    if as_json:
        print(json.dumps([_row(head) for head in heads]))
    elif not heads:
        print(f"no exit heads: none is shipped, and none is in {local_root()}")
    else:
        Console(highlight=False).print(_table(heads))


@app.command("show")
def show(head: Annotated[Path, typer.Argument(help="A head directory.")]) -> None:
    """Print what a head is: model, exit, vocabulary, training and measured agreement, as JSON."""
    from ppsd.model.exit_head import read_head_config

    print(json.dumps(read_head_config(head).to_json(), indent=1))


def _row(head: FoundHead) -> dict[str, object]:
    row: dict[str, object] = {"path": str(head.path), "shipped": head.shipped, "bytes": head.size}
    if head.config is None:
        return row | {"problem": head.problem}
    config = head.config
    fields = ("base_model", "fingerprint", "kind", "exit_layer", "layers", "mlp", "feedback",
              "copy_gate", "draft_vocab")  # fmt: skip
    return row | {name: getattr(config, name) for name in fields} | {"alpha": head.alpha}


def _table(heads: list[FoundHead]) -> Table:
    names = ("model", "exit", "kind", "layers", "draft vocabulary", "α", "MiB", "path")
    columns = (Column(name, overflow="fold") for name in names)  # a cut path could not be used
    table = Table(*columns, box=None, pad_edge=False)
    for head in heads:
        size = f"{head.size / 2**20:.1f}"
        if head.config is None:
            table.add_row("damaged", *[""] * 5, size, visible(head.problem))
            continue
        c, alpha = head.config, "–" if head.alpha is None else f"{head.alpha:.3f}"
        scored = "all" if c.draft_vocab is None else str(c.draft_vocab)
        place = f"{head.path} (shipped)" if head.shipped else str(head.path)
        cells = (c.base_model, str(c.exit_layer), c.kind, str(c.layers), scored, alpha, size, place)
        table.add_row(*map(visible, cells))
    return table
