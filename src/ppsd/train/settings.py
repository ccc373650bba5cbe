"""Settings of a training run: all that decides the weights, checked before work begins.

Does not import PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ppsd import checks
from ppsd.errors import ConfigError
from ppsd.settings import TEMPLATE_HELP, setting

KINDS = ("transformer", "norm")
INITS = ("exit", "last")
HEAD, DATA, TRAINING = "Head", "Data", "Training"
DTYPES = ("auto", "float32", "bfloat16", "float64")
BEGINNING_RATE, FURTHER_RATE = 4e-3, 1e-3  # of heads that begin, and of those that go on
RATE_WIDTH = 576  # of the rows where these were best; wider ones take less (Yang et al. 2022)
FULL_RATE_STEPS = 250  # of a run, see peak_rate; and four times as many from this held-out α on:
LEADING = 0.5
WARMUP_STEPS = 50  # at least, if that leaves half of the run
MAX_SEED = 2**32 - 1  # so that seeds of epochs and steps, which are multiples, have 63 bits
STEP_TOKENS = {"cpu": 512, "cuda": 2048}  # a GPU takes as long for fewer
BETAS = (0.9, 0.95)  # a run has hundreds of steps, too few for AdamW's usual 0.999


@dataclass(frozen=True)
class DistillConfig:
    """One run that trains a head at each of ``exit_layers``.

    ``kind`` transformer has ``head_layers`` decoder layers, which begin as copies of the model's
    last layers (``init`` last) or of those after the exit (exit), with ``head_mlp`` neurons in
    their MLPs (0 for as many as the model's), and which read verified rows with ``feedback``
    and weigh copies with ``copy_gate``; ``norm`` heads never do. ``draft_vocab`` 0 scores all
    tokens. ``start`` names trained heads, separated by commas, of some or all of the exits.
    ``chat_template`` takes the place of the model's own. ``learning_rate`` None lets the
    run decide (``peak_rate``), and ``suited`` what no ``exit_layers`` and ``batch_tokens`` 0 mean.
    ``warmup`` is a share of all steps. ``batch_tokens`` counts padding. ``validation`` examples are
    held out, at most a tenth. With ``minutes`` training ends after that time, however many
    ``epochs`` it did not get to, and the learning rate has come down by then. Raises ConfigError.
    """

    exit_layers: tuple[int, ...] = setting(
        "Layers to read, one head each: 4,8,15. A quarter and half of the model's if left out.",
        (),
        flag="--exit-layer",
        panel=HEAD,
        metavar="L,…",
    )
    kind: str = setting(
        "transformer or norm.", "transformer", flag="--head", panel=HEAD, metavar="KIND"
    )
    head_mlp: int = setting(
        "Neurons of a transformer head's MLP; 0 for as many as the model's.", 0, panel=HEAD
    )
    draft_vocab: int = setting(
        "Score the most frequent target tokens only; 0 scores all.", 8192, panel=HEAD
    )
    start: str | None = setting(
        "Heads to go on from, by name or directory; other exits begin as a linear guess.",
        None,
        panel=HEAD,
        metavar="HEAD,…",
    )
    learning_rate: float | None = setting(
        "Peak of the schedule; if left out, 4e-3 at most, and 1e-3 with --start.",
        None,
        panel=TRAINING,
    )
    epochs: int = setting("Passes over the data.", 1, panel=TRAINING)
    minutes: float = setting(
        "Minutes to write and train in, wherever the run stands then; 0 is no limit.",
        0.0,
        panel=TRAINING,
    )
    batch_tokens: int = setting(
        "Padded tokens of a step; 0 for 512 on CPUs and 2048 on GPUs.", 0, panel=TRAINING
    )
    seed: int = setting(
        "Seed of the data's order, of what is held out, and of noise.", 0, panel=TRAINING
    )
    dtype: str = setting(
        "auto, bfloat16, float32 or float64.", "auto", panel=TRAINING, metavar="DTYPE"
    )
    max_length: int = setting("Tokens of an example; answers are cut.", 1024, panel=DATA)
    all_positions: bool = setting(
        "Prompts count too, at 0.3 of an answer's weight.", False, panel=DATA
    )
    raw: bool = setting("No chat template.", False, panel=DATA)
    chat_template: str | None = setting(TEMPLATE_HELP, None, panel=DATA, metavar="FILE|TEXT")
    validation: int = setting(
        "Examples held out, at most a tenth, but all answers to a prompt.", 64, panel=DATA
    )
    # In Python only: no other value is known to give a better head.
    head_layers: int = 1
    feedback: bool = True
    copy_gate: bool = True
    init: str = "last"
    kl_weight: float = 1.0
    ce_weight: float = 0.1
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        checks.one_of("head", self.kind, KINDS)
        checks.one_of("init", self.init, INITS)
        checks.one_of("dtype", self.dtype, DTYPES)
        for name in ("head_layers", "epochs", "validation"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("max_length", self.max_length, 2)
        for name in ("head_mlp", "draft_vocab", "batch_tokens"):
            checks.integer(name, getattr(self, name), 0)
        checks.integer("seed", self.seed, 0, MAX_SEED)
        for name in ("kl_weight", "ce_weight", "weight_decay", "warmup", "minutes"):
            checks.number(name, getattr(self, name), 0)
        checks.number("clip", self.clip, 0, low_open=True)
        if self.learning_rate is not None:
            checks.number("learning_rate", self.learning_rate, 0, low_open=True)
        if self.start is not None:
            checks.string("start", self.start)
        if self.raw and self.chat_template is not None:
            raise ConfigError("chat_template", self.chat_template, "left out with raw texts")
        if self.kind == "norm":
            if self.head_mlp:
                raise ConfigError("head_mlp", self.head_mlp, "left out with norm heads")
            object.__setattr__(self, "feedback", False)
            object.__setattr__(self, "copy_gate", False)
        if self.kl_weight + self.ce_weight == 0:
            raise ConfigError("kl_weight", 0.0, "above 0 when ce_weight is 0")
        if len(set(self.exit_layers)) < len(self.exit_layers):
            raise ConfigError("exit_layer", self.exit_layers, "different layers")

    @property
    def layers(self) -> int:
        return self.head_layers if self.kind == "transformer" else 0

    @property
    def mlp(self) -> int | None:
        """Return the neurons of a head layer's MLP, None for as many as the model's."""
        return self.head_mlp or None if self.layers else None

    def suited(self, num_layers: int, device: str) -> DistillConfig:
        """Return the settings with what was left out, for a model and a device such as cuda:1.

        Exits are where stage 0 of four, and of two, would end. Raises ConfigError for a model of
        one layer.
        """
        tokens = self.batch_tokens or STEP_TOKENS.get(device.partition(":")[0], STEP_TOKENS["cuda"])
        if self.exit_layers:
            return replace(self, batch_tokens=tokens)
        if num_layers < 2:
            raise ConfigError("model", f"of {num_layers} layer", "of 2 layers or more")
        quarter = max(1, round(num_layers / 4))
        exits = dict.fromkeys((quarter, max(quarter, num_layers // 2)))
        return replace(self, exit_layers=tuple(exits), batch_tokens=tokens)

    def check_model(self, num_layers: int, max_context: int, neurons: int) -> None:
        """Raise ConfigError for what a model of this size cannot do."""
        if not self.exit_layers:
            raise ConfigError("exit_layer", self.exit_layers, "one or more layers")
        for layer in self.exit_layers:
            if not 1 <= layer < num_layers:
                raise ConfigError("exit_layer", layer, f"in [1, {num_layers - 1}] for this model")
            if self.init == "exit" and layer + self.layers > num_layers:
                allowed = f"at most {num_layers - layer}, the layers after exit {layer}"
                raise ConfigError("head_layers", self.head_layers, allowed)
        if self.head_layers > num_layers:
            raise ConfigError("head_layers", self.head_layers, f"at most {num_layers}")
        if self.head_mlp > neurons:
            raise ConfigError("head_mlp", self.head_mlp, f"at most {neurons}, as in the model")
        if self.max_length > max_context:
            allowed = f"at most {max_context}, the context this model was made for"
            raise ConfigError("max_length", self.max_length, allowed)

    def first_copied(self, exit_layer: int, num_layers: int) -> int:
        """Return the model's layer that a head's first layer begins as."""
        return exit_layer if self.init == "exit" else num_layers - self.layers

    def rate(self, done: float, steps: int, peak: float) -> float:
        """Return the learning rate when this share of a run of about ``steps`` steps is done.

        It rises linearly over the ``warmup`` and falls from ``peak`` to zero along a cosine. A
        share of a short run is too few steps for AdamW to learn its scales, so there the rise is
        longer.
        """
        rising = self.warmup and max(self.warmup, min(0.5, WARMUP_STEPS / steps))
        if done < rising:
            return peak * done / rising
        rest = (done - rising) / (1 - rising) if rising < 1 else 0.0
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))

    def peak_rate(self, steps: int, width: int, start: float, begun: bool) -> float:
        """Return the rate after the warm-up, of a head that began with a held-out α of ``start``.

        One that has ``begun`` to learn before is thrown back by a high rate. A short run at the
        rate of a long one leaves its place and cannot come back; where least squares leads there
        is most to lose. ``width`` is that of the rows.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        rate = FURTHER_RATE if begun else BEGINNING_RATE
        full = FULL_RATE_STEPS * (4 if start >= LEADING else 1)
        return rate * min(1.0, RATE_WIDTH / width) * min(1.0, math.sqrt(steps / full))

    def to_json(self) -> dict[str, Any]:
        """Return the settings for provenance, and to tell if a checkpoint belongs to this run."""
        return asdict(self) | {"exit_layers": list(self.exit_layers)}
