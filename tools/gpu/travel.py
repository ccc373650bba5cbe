"""Pack what a GPU machine lacks into parts of limited size, and put them together there.

The weights of the default model, prompts and pure-Python wheels travel in turn with the checkout;
a manifest holds the digests. ``pack`` is also the dry run: it prints what travels, and how often.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from ppsd.model.source import resolve_model

PARTS = Path("runs/gpu-parts")
MANIFEST = "manifest.json"
WHEELS = ("gguf", "typer", "rich", "click", "shellingham")  # what such a machine lacks
MIB = 1 << 20


def checkout_bytes() -> int:
    """Return the size of the files that travel with every call: tracked, or not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    return sum(path.stat().st_size for name in listed if name and (path := Path(name)).is_file())


def pack(prompts: list[Path], limit: int) -> None:
    """Write the parts and print what travels."""
    shutil.rmtree(PARTS, ignore_errors=True)
    (PARTS / "all").mkdir(parents=True)
    model = resolve_model(None).path
    archive = PARTS / "all.tar.gz"
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
         "--python-version", "3.12", "--dest", str(PARTS / "all"), *WHEELS],
        check=True,
    )  # fmt: skip
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(model, model.name)
        for path in prompts:
            rows = [
                json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line
            ]
            short = PARTS / "all" / path.name
            kept = ({"prompt": row["prompt"]} for row in rows)
            short.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
            tar.add(short, f"prompts-{path.name}")
        for wheel in sorted((PARTS / "all").glob("*.whl")):
            tar.add(wheel, f"wheels/{wheel.name}")
    checkout = checkout_bytes()
    room = limit * MIB - checkout - MIB
    if room < MIB:
        sys.exit(f"the checkout alone has {checkout / MIB:.0f} MiB; the limit is {limit} MiB")
    size, count = archive.stat().st_size, split(archive, PARTS, room)
    shutil.rmtree(PARTS / "all")
    archive.unlink()
    print(f"checkout {checkout / MIB:.1f} MiB with each call; {size / MIB:.1f} MiB in "
          f"{count} parts of at most {room / MIB:.1f} MiB")  # fmt: skip
    for i in range(count):
        print(f"call {i + 1}: carry {PARTS}/part-{i}, run tools/gpu/kit.sh receive {i}")


def split(archive: Path, parts: Path, size: int) -> int:
    """Cut ``archive`` into folders of at most ``size`` bytes; return how many there are."""
    content = archive.read_bytes()
    pieces = [content[first : first + size] for first in range(0, len(content), size)]
    manifest = {"parts": len(pieces), "sha256": hashlib.sha256(content).hexdigest()}
    for i, piece in enumerate(pieces):
        (parts / f"part-{i}").mkdir(parents=True)
        (parts / f"part-{i}" / "data").write_bytes(piece)
        (parts / f"part-{i}" / MANIFEST).write_text(json.dumps(manifest))
    return len(pieces)


def receive(parts: Path, kept: Path, number: int) -> None:
    """Keep a part; with the last one unpack everything, once its digest is right."""
    kept.mkdir(parents=True, exist_ok=True)
    source = parts / f"part-{number}"
    shutil.copy(source / "data", kept / f"data-{number}")
    manifest = json.loads((source / MANIFEST).read_text())
    have = [kept / f"data-{i}" for i in range(manifest["parts"])]
    missing = [path.name for path in have if not path.exists()]
    if missing:
        print(f"kept part {number}; still to come: {', '.join(missing)}")
        return
    archive = kept / "all.tar.gz"
    with archive.open("wb") as file:
        for path in have:
            file.write(path.read_bytes())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != manifest["sha256"]:
        sys.exit(f"the parts have sha256 {digest}, not {manifest['sha256']}; send them again")
    with tarfile.open(archive) as tar:
        tar.extractall(kept, filter="data")
    print(f"unpacked into {kept}: {', '.join(sorted(path.name for path in kept.iterdir()))}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kept", type=Path, required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("prompts", type=Path, nargs="+")
    packing.add_argument("--limit", type=int, default=64, help="MiB of one transfer")
    receiving = commands.add_parser("receive")
    receiving.add_argument("number", type=int)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.prompts, args.limit)
    else:
        receive(PARTS, args.kept, args.number)


if __name__ == "__main__":
    main()
