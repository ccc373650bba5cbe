"""``ppsd heads``: which exit heads there are, and what one of them is."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from ppsd.cli.display import list_console, size
from ppsd.cli.settings import check_environment
from ppsd.cli.streams import visible
from ppsd.errors import counted

if TYPE_CHECKING:
    from ppsd.model.head_library import FoundHead

app = typer.Typer(help="List and inspect exit heads.", no_args_is_help=True, add_completion=False)


@app.command("list")
def list_heads(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the heads shipped with ppsd and those in $PPSD_HEAD_DIR (else in the cache)."""
    from ppsd.model.head_library import find_heads, local_root

    check_environment()
    heads = find_heads()
    if as_json:
        print(json.dumps([_row(head) for head in heads]))
        return
    if not heads:
        print(f"no exit heads: none is shipped, and none is in {local_root()}")
    console = list_console()
    fit = [head for head in heads if head.config is not None]
    for model, group in groupby(sorted(fit, key=_order), key=lambda head: _order(head)[0]):
        console.print(f"{model}:", style="bold")
        console.print(_table(list(group)))
    for head in heads:
        if head.config is None:
            console.print(f"damaged: {head.problem}", style="yellow", soft_wrap=True)


@app.command("show")
def show(
    head: Annotated[str, typer.Argument(help="A head by the name that list shows, or directory.")],
) -> None:
    """Print what a head is: model, exit, vocabulary, training and measured agreement, as JSON."""
    from ppsd.model.head_files import read_head_config
    from ppsd.model.head_library import head_directory

    check_environment()
    print(json.dumps(read_head_config(head_directory(head)).to_json(), indent=1))


def _order(head: FoundHead) -> tuple[str, int, str]:
    assert head.config is not None
    return head.config.base_model, head.config.exit_layer, head.name


def _row(head: FoundHead) -> dict[str, object]:
    row: dict[str, object] = {
        "name": head.name,
        "path": str(head.path),
        "shipped": head.shipped,
        "bytes": head.size,
    }
    if head.config is None:
        return row | {"problem": head.problem}
    config = head.config
    fields = ("base_model", "fingerprint", "kind", "exit_layer", "layers", "mlp", "feedback",
              "copy_gate", "draft_vocab")  # fmt: skip
    return row | {name: getattr(config, name) for name in fields} | _rate(head)


def _rate(head: FoundHead) -> dict[str, object]:
    if (rate := head.rate) is None:
        return {"alpha": None, "alpha_origin": None, "interval": None}
    return {"alpha": rate.alpha, "alpha_origin": rate.origin, "interval": rate.interval}


def _table(heads: list[FoundHead]) -> Table:
    table = Table(
        Column("--head", overflow="fold"),  # a cut name could not be used
        *(Column(name, justify="right", no_wrap=True) for name in ("exit", "kind", "vocab")),
        *(Column(name, justify="right", no_wrap=True) for name in ("α", "size")),
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    for head in heads:
        c, rate = head.config, head.rate
        assert c is not None
        alpha = "–" if rate is None else f"{rate.alpha:.3f} {rate.origin}"
        scored = "all" if c.draft_vocab is None else str(c.draft_vocab)
        kind = counted(c.layers, "layer") if c.layers else c.kind
        cells = (head.name, str(c.exit_layer), kind, scored, alpha, size(head.size))
        table.add_row(*map(visible, cells))
    return table
