"""Put a run together: the frozen teacher, the data, and the trainer in its directory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ppsd import checks
from ppsd.errors import ConfigError, HeadError
from ppsd.model.exit_head import read_weights
from ppsd.model.head_files import (
    CONFIG_FILE,
    check_head,
    read_head_config,
    read_prompts,
    weights_digest,
)
from ppsd.model.head_library import head_directory
from ppsd.model.identity import Identity
from ppsd.model.layers import NATIVE
from ppsd.model.source import describe, resolve_model
from ppsd.model.stage import Stage, StagePlan
from ppsd.model.tokenizer import Tokenizer
from ppsd.model.weights import TensorSource, check_shapes, open_source, weights_mark
from ppsd.train.checkpoint import RunDirectory
from ppsd.train.data import (
    Encoding,
    choose_draft_vocab,
    count_tokens,
    encode_all,
    hold_out,
    was_read,
)
from ppsd.train.distill import Cadence, Lesson, Trainer
from ppsd.train.features import FeatureSource, FeatureStore, live_features
from ppsd.train.records import DataFile, Record
from ppsd.train.settings import DistillConfig
from ppsd.train.start import Beginning

MOST_EXAMPLES = 10_000_000  # of all epochs: their order is planned beforehand


@dataclass(frozen=True)
class Teacher:
    """The frozen model in one piece, where its weights are, and how its text becomes tokens."""

    stage: Stage
    source: TensorSource
    identity: Identity
    encoding: Encoding

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def compute(self) -> str:
        """Return what computes the frozen model: results differ between these."""
        return f"{self.stage.plan.dtype} on {self.stage.plan.device.type}"


@dataclass(frozen=True)
class DataSummary:
    """The size of the data, in examples and tokens.

    Of those held out ``read_before`` were read by heads that the run goes on from, as far as they
    tell; ``read_unknown`` says that one of them tells nothing.
    """

    examples: int
    held_out: int
    read_before: int
    read_unknown: bool
    tokens: int
    targets: int
    cut: int
    dropped: int
    lost_mass: float


def load_teacher(
    model: str | None,
    config: DistillConfig,
    device: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Teacher:
    """Load the whole model on one device; raises ModelError or ConfigError before weights."""
    files = resolve_model(model)
    spec = describe(files)
    config.check_model(spec.num_layers, spec.max_context, spec.intermediate_size)
    source = open_source(files.path)
    check_shapes(source, spec)
    identity = Identity.of(spec, source)
    tokenizer = Tokenizer.load(files.path, config.chat_template)
    place = open_device(device)
    dtype = compute_dtype(config.dtype, place)
    plan = StagePlan(0, spec.num_layers, config.max_length, dtype, place)
    spec = tokenizer.fit(spec)
    ends = [end for end in (*tokenizer.eos_ids, *spec.eos_ids) if end in spec.eos_ids]
    encoding = Encoding(
        tokenizer,
        config.max_length,
        identity.fingerprint,
        eos=ends[0] if ends else None,
        raw=config.raw,
        all_positions=config.all_positions,
        weights=weights_mark(spec, source),
    )
    return Teacher(Stage(spec, plan, source, progress), source, identity, encoding)


def open_device(name: str) -> torch.device:
    """Return the device; raises ConfigError where PyTorch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        text = str(error).splitlines()[0]
        raise ConfigError("device", name, f"cpu or a GPU that PyTorch can use ({text})") from error
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return a dtype; ``auto`` is bfloat16 if the device multiplies it natively, else float32."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = NATIVE[torch.bfloat16]
    return torch.bfloat16 if native else torch.float32


def open_features(teacher: Teacher, config: DistillConfig, path: Path) -> FeatureStore:
    """Open the rows kept in ``path`` that heads at the run's exits need."""
    mark = f"{teacher.encoding.weights} in {teacher.compute}"
    return FeatureStore(path, teacher.stage, config.exit_layers, mark)


def read_starts(teacher: Teacher, config: DistillConfig) -> dict[int, Beginning]:
    """Return the heads to go on from, by exit layer.

    Raises ConfigError for heads that have other parts than the run's or are not at its exits, and
    HeadError for damaged ones and those of another model.
    """
    starts: dict[int, Beginning] = {}
    parts = ("kind", "layers", "mlp", "feedback", "copy_gate")
    for name in (config.start or "").split(","):
        if not name:
            continue
        path = head_directory(name)
        head = read_head_config(path)
        for part in parts:
            if (has := getattr(head, part)) != (trains := getattr(config, part)):
                allowed = f"a head with {part} {trains!r}, as this run trains (it has {has!r})"
                raise ConfigError("start", name, allowed)
        if head.exit_layer not in set(config.exit_layers) - starts.keys():
            exits = ", ".join(map(str, config.exit_layers))
            allowed = f"one head for each exit of {exits} (it is at exit {head.exit_layer})"
            raise ConfigError("start", name, allowed)
        check_head(head, teacher.stage.spec, teacher.identity, head.exit_layer, name)
        weights = read_weights(path, head, teacher.stage.spec)
        with checks.inside(str(path / CONFIG_FILE), HeadError):
            tokens = checks.integer("provenance.tokens", head.provenance.get("tokens", 0), 0)
        about = weights_digest(path), read_prompts(path)
        starts[head.exit_layer] = Beginning(weights, tokens, *about)
    return starts


def _check_epochs(epochs: int, examples: int) -> None:
    most = max(1, MOST_EXAMPLES // examples)
    if epochs > most:
        allowed = f"at most {most} over {examples} examples (--minutes ends a run, too)"
        raise ConfigError("epochs", epochs, allowed)


def prepare_run(
    teacher: Teacher,
    config: DistillConfig,
    records: Sequence[Record],
    files: Sequence[DataFile],
    out: Path,
    cadence: Cadence,
    store: Path | None = None,
    filling: Callable[[int, int], None] = lambda done, total: None,
    vocabulary: Sequence[Record] = (),
) -> tuple[Trainer, DataSummary]:
    """Prepare a run: encode, hold out, choose the draft vocabulary, and open its directory.

    Tokens of ``vocabulary`` are counted for the draft vocabulary, and for nothing else; ``files``
    are those of both. With a ``store`` the frozen model runs now, over what that directory does
    not hold yet: ``filling(tokens done, tokens in all)``.
    """
    config = config.suited(teacher.stage.spec.num_layers, teacher.stage.plan.device.type)
    corpus = encode_all(records, teacher.encoding)
    _check_epochs(config.epochs, len(corpus.examples))
    starts = read_starts(teacher, config)
    read = {digest for start in starts.values() for digest in start.prompts}
    train, held_out = hold_out(corpus.examples, config.validation, config.seed, read)
    draft_ids, lost = None, 0.0
    vocab_size = teacher.stage.spec.vocab_size
    if config.draft_vocab:
        targets = count_tokens((e.targets for e in train), vocab_size)
        more = count_tokens(map(teacher.encoding.all_tokens, vocabulary), vocab_size)
        draft_ids, lost = choose_draft_vocab(targets, config.draft_vocab, more)
    settings = (
        config.to_json()
        | {
            **teacher.encoding.stamp,  # what a template says counts, not the name of its file
            "data": [f"{file.sha256} for {file.use}" for file in files],
            "validate_every": cadence.validate,  # decides among what states the best is chosen
            "compute": teacher.compute,
            "features": store is not None,
            "starts": [start.digest for start in starts.values()],
            "read": hashlib.sha256(" ".join(sorted(read)).encode()).hexdigest()[:16],  # by these
        }
    )
    directory = RunDirectory(out, settings)
    features: FeatureSource = live_features(teacher.stage, config.exit_layers)
    if store is not None:
        features = kept = open_features(teacher, config, store)
        kept.fill(corpus.examples, filling)
    lesson = Lesson(train, held_out, draft_ids, features, starts)
    trainer = Trainer(teacher.stage, config, lesson, directory, cadence)
    summary = DataSummary(
        examples=len(train),
        held_out=len(held_out),
        read_before=sum(was_read(e, read) for e in held_out),
        read_unknown=any(not start.prompts for start in starts.values()),
        tokens=sum(len(e.tokens) for e in train),
        targets=sum(len(e.targets) for e in train),
        cut=corpus.cut,
        dropped=corpus.dropped,
        lost_mass=lost,
    )
    return trainer, summary
