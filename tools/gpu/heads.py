"""Train exit heads at scale: the model answers many prompts in large batches, then heads learn.

Several processes share the GPU, since one alone leaves it idle while Python works: first each
writes answers at a temperature of its own, then each trains heads of a size of its own. What there
is of heads so far is written every minute, so a run that is cut short leaves usable ones.

    python tools/gpu/heads.py --minutes 8 --out DIR prompts.jsonl …
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from ppsd.train.distill import Cadence, StepReport
from ppsd.train.evaluate import Agreement
from ppsd.train.records import read_data
from ppsd.train.result import Origin, save_heads
from ppsd.train.run import load_teacher, prepare_run
from ppsd.train.selfgen import GenerateConfig
from ppsd.train.settings import DistillConfig
from ppsd.train.targets import GenerateReport, write_targets

WRITERS = ((0.0, 0), (0.7, 1), (1.0, 2), (0.85, 3))  # temperature and seed of each process
STUDENTS = {  # name: exits, layers of each head
    "one-layer": ((4, 8, 15, 18), 1),
    "three-layers": ((4, 8, 15), 3),
}
TINY_STUDENTS = {"one-layer": ((1, 2), 1), "two-layers": ((2,), 2)}
WRITING_SHARE = 0.36  # of the time, for answers
STARTING = 40.0  # seconds between the two: imports, weights, reading what was written
PREPARING = 45.0  # seconds from reading the answers to the first step, and to write the heads
SAVED_EVERY = 60.0  # seconds
PART_BYTES = 15 << 20  # what comes back travels in files of at most this size


def config_of(exits: tuple[int, ...], layers: int, minutes: float, tiny: bool) -> DistillConfig:
    """Return the settings of a training process."""
    if tiny:
        return DistillConfig(
            exits, head_layers=layers, minutes=minutes, epochs=1000, draft_vocab=64,
            batch_tokens=256, max_length=128, validation=4, all_positions=True,
        )  # fmt: skip
    return DistillConfig(
        exits, head_layers=layers, minutes=minutes, epochs=6, warmup=0.02,
        learning_rate=4e-3 if layers == 1 else 3e-3,
        batch_tokens=32768, max_length=1024, validation=256, all_positions=True,
    )  # fmt: skip


def write_answers(args: argparse.Namespace) -> None:
    """Write answers of one temperature into ``args.out``, until ``args.minutes`` are over."""
    config = config_of((1,), 1, 0.0, args.tiny)
    teacher = load_teacher(args.model, config, args.device)
    records, _ = read_data(args.prompts)
    deadline = time.monotonic() + 60 * args.minutes
    written = GenerateConfig(
        batch=16 if args.tiny else args.batch,
        max_new=16 if args.tiny else 256,
        temperature=args.temperature,
        seed=args.seed,
    )
    started = time.monotonic()
    last = GenerateReport(0, 0, 0, 0, 0.0)

    def report(now: GenerateReport) -> None:
        nonlocal last
        last = now

    write_targets(
        teacher.stage, records, teacher.encoding, written, args.out, report, deadline=deadline
    )
    seconds = time.monotonic() - started
    summary = {"answers": last.done, "tokens": last.tokens, "seconds": round(seconds, 1)}
    args.out.with_suffix(".json").write_text(
        json.dumps({"temperature": args.temperature, "seed": args.seed, **summary})
    )


def train(args: argparse.Namespace) -> None:
    """Train the heads named ``args.name`` on ``args.prompts`` (answers) into ``args.out``."""
    deadline = time.monotonic() + 60 * args.minutes
    exits, layers = (TINY_STUDENTS if args.tiny else STUDENTS)[args.name]
    settings = config_of(exits, layers, args.minutes, args.tiny)
    teacher = load_teacher(args.model, settings, args.device)
    records, files = read_data(args.prompts)
    every = 10 if args.tiny else 400
    minutes = max((deadline - time.monotonic() - PREPARING) / 60, args.minutes / 2)
    config = config_of(exits, layers, minutes, args.tiny)
    trainer, summary = prepare_run(teacher, config, records, files, args.out, Cadence(every, 10**9))
    origin = Origin(teacher.stage.spec.name, teacher.identity, files, summary.lost_mass)
    saved = time.monotonic()
    print(
        f"{args.name}: {summary.tokens:,} tokens of {summary.examples:,} answers were ready "
        f"after {saved + 60 * args.minutes - deadline:.0f} s; {minutes:.1f} minutes follow",
        flush=True,
    )

    def report(now: StepReport) -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVED_EVERY:
            save_heads(trainer, origin, {n: Agreement(now.alpha[n], 0.0, None, 0) for n in exits})
            saved = time.monotonic()

    save_heads(trainer, origin, trainer.run(report))


def gather(work: Path, out: Path, found: dict[str, Any]) -> None:
    """Pack all heads so far into ``heads.tar`` parts in ``out``, and what is known of them."""
    archive = work / "heads.tar"
    with tarfile.open(archive, "w") as tar:
        listed = False
        for name in TINY_STUDENTS | STUDENTS:
            for head in sorted((work / name).glob("transformer-*")):
                for file in sorted(head.iterdir()):
                    if file.name == "prompts.txt":
                        if listed:
                            continue
                        listed = True
                    tar.add(file, f"{name}/{head.name}/{file.name}")
    content = archive.read_bytes()
    for i, first in enumerate(range(0, len(content), PART_BYTES)):
        (out / f"heads.tar.{i}").write_bytes(content[first : first + PART_BYTES])
    for name in TINY_STUDENTS | STUDENTS:
        metrics = work / name / "metrics.jsonl"
        if metrics.exists():
            found[name] = thinned([json.loads(line) for line in metrics.read_text().splitlines()])
    (out / "heads.json").write_text(json.dumps(found, indent=1) + "\n")


def thinned(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return validations, and the last step and speed of a run."""
    steps = [r for r in metrics if "loss" in r]
    checks = [r for r in metrics if "validation" in r or "final" in r]
    seconds = sum(r["seconds"] for r in steps)
    tokens = steps[-1]["tokens"] if steps else 0
    return {
        "steps": len(steps),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0,
        "forward_share": round(sum(r["forward_seconds"] for r in steps) / seconds, 3)
        if seconds
        else 0,
        "validations": checks,
    }


def run(args: argparse.Namespace) -> None:
    """Run the writers, then the trainers, within ``args.minutes``; results go to ``args.out``."""
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    common = ["--device", args.device, *(["--tiny"] if args.tiny else [])]
    common += ["--model", args.model] if args.model else []
    writers = WRITERS[:2] if args.tiny else WRITERS
    writing = args.minutes * WRITING_SHARE
    answers = [args.work / f"answers-{seed}.jsonl" for _, seed in writers]
    children = [
        start("write", *common, "--minutes", str(writing), "--batch", str(args.batch),
              "--temperature", str(t), "--seed", str(seed), "--out", str(path), *args.prompts)
        for (t, seed), path in zip(writers, answers, strict=True)
    ]  # fmt: skip
    wait(children, started + 60 * writing + STARTING * (5 if args.tiny else 1))
    written = [path for path in answers if path.exists() and path.stat().st_size]
    found: dict[str, Any] = {
        "written": [
            json.loads(p.with_suffix(".json").read_text())
            for p in written
            if p.with_suffix(".json").exists()
        ],
        "writing_seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(found), flush=True)
    if not written:
        sys.exit("no process wrote any answer in time")
    left = max(args.minutes / 3, args.minutes - (time.monotonic() - started) / 60 - 0.4)
    names = TINY_STUDENTS if args.tiny else STUDENTS
    children = [
        start("train", *common, "--minutes", str(left), "--name", name,
              "--out", str(args.work / name), *map(str, written))
        for name in names
    ]  # fmt: skip
    while any(child.poll() is None for child in children):
        time.sleep(1 if args.tiny else 15)
        gather(args.work, args.out, found)
    gather(args.work, args.out, found)
    found["seconds"] = round(time.monotonic() - started, 1)
    found["exit_codes"] = [child.returncode for child in children]
    (args.out / "heads.json").write_text(json.dumps(found, indent=1) + "\n")
    if any(child.returncode for child in children):
        sys.exit("a training process failed; its traceback is above")


def start(*words: str) -> subprocess.Popen[bytes]:
    """Start this script in another role."""
    return subprocess.Popen([sys.executable, __file__, *words])


def wait(children: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait for processes; end those that are late, whose files hold what they wrote."""
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def main() -> None:
    """Parse the command line and run a role."""
    parser = argparse.ArgumentParser(description=__doc__)
    roles = {"run": run, "write": write_answers, "train": train}
    parser.add_argument("role", choices=roles)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, on a CPU")
    parser.add_argument("--model")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--batch", type=int, default=640)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name")
    args = parser.parse_args()
    roles[args.role](args)


if __name__ == "__main__":
    main()
