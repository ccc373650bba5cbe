"""Agreement with the model on held-out text: of what can be said, in answers, with lookup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppsd.train.copies import NONE
from ppsd.train.data import Example
from ppsd.train.distill import Trainer
from ppsd.train.evaluate import prepare
from ppsd.train.features import live_features
from tests.support.teachers import random_examples, tiny_config, tiny_teacher, tiny_trainer

Models = Callable[[str], Path]


def perfect_trainer(model: Path, out: Path, **changes: object) -> Trainer:
    """Its head is the rest of the model, and thinks nothing of copies."""
    config = tiny_config(3, head_layers=3, **changes)
    teacher = tiny_teacher(model, config)
    trainer = tiny_trainer(teacher, config, out)
    with torch.no_grad():
        for own, true in zip(trainer.students[0].layers, teacher.stage.layers[3:], strict=True):
            own.o.copy_(true.o)
            own.down.copy_(true.down)
    set_odds(trainer, -99)
    return trainer


@torch.no_grad()
def set_odds(trainer: Trainer, odds: float) -> None:
    """What the copy gate says of every copy."""
    bias = trainer.students[0].tensors.copy_bias
    assert bias is not None
    bias.fill_(odds)


def test_a_head_that_is_the_rest_of_the_model_always_agrees(
    tiny_model: Models, tmp_path: Path
) -> None:
    trainer = perfect_trainer(tiny_model("llama"), tmp_path, draft_vocab=0)
    found = trainer._validate()[3]
    assert (found.alpha, found.top4, found.between) == (1.0, 1.0, (1.0, 1.0))


def test_the_draft_vocabulary_costs_agreement(tiny_model: Models, tmp_path: Path) -> None:
    """A perfect head misses exactly the greedy tokens it cannot say."""
    trainer = perfect_trainer(tiny_model("llama"), tmp_path)
    told, greedy = [], torch.cat([part.greedy for part in trainer._held])
    for part in trainer._held:  # whose prompts are one token long
        told.append(part.batch.tokens[part.batch.rows // part.batch.tokens.shape[1], 0])
    sayable = (greedy % 3 == 0) | (greedy == torch.cat(told))  # tiny_trainer drafts every third
    assert trainer._validate()[3].alpha == pytest.approx(sayable.double().mean().item())


def test_an_answer_may_say_what_stands_in_its_own_prompt(
    tiny_model: Models, tmp_path: Path
) -> None:
    """Here the first two greedy tokens of each example, and those of no other example."""
    trainer = perfect_trainer(tiny_model("llama"), tmp_path)
    held, sayable = [], []
    for part in trainer._held:
        whose = part.batch.rows // part.batch.tokens.shape[1]
        greedy = [part.greedy[whose == i].int() for i in range(len(part.batch.examples))]
        told = tuple([Example(own, 2, prompt=2) for own in greedy])
        held.append(replace(part, batch=replace(part.batch, examples=told)))
        sayable += [(own % 3 == 0) | torch.isin(own, own[:2]) for own in greedy]
    trainer._held = held
    share = torch.cat(sayable).double().mean().item()
    assert max(len(part.batch.examples) for part in held) > 1
    assert trainer._validate()[3].alpha == pytest.approx(share)


def test_held_out_agreement_is_that_of_the_mixture(tiny_model: Models, tmp_path: Path) -> None:
    """A gate that always opens gives the share of right copies, where there is one."""
    trainer = perfect_trainer(tiny_model("llama"), tmp_path, draft_vocab=0)
    set_odds(trainer, 99)
    right = [
        torch.where(part.copies.tokens == NONE, part.greedy, part.copies.tokens) == part.greedy
        for part in trainer._held
    ]
    share = torch.cat(right).double().mean().item()
    assert trainer._validate()[3].alpha == pytest.approx(share)
    assert share < 0.9
    alone = [part.copies.tokens == part.greedy for part in trainer._held]
    assert trainer.lookup == pytest.approx(torch.cat(alone).double().mean().item())


def test_held_out_agreement_is_of_answers(tiny_model: Models) -> None:
    """With all positions trained on, too: nothing is drafted within a prompt."""
    teacher = tiny_teacher(tiny_model("llama"), tiny_config())
    examples = [replace(e, start=1, prompt=5) for e in random_examples(3)]
    held = prepare(teacher.stage, examples, live_features(teacher.stage, (3,)), 96)
    answers = sum(len(e.tokens) - e.prompt for e in examples)
    assert sum(len(part.greedy) for part in held) == answers


def test_a_head_without_a_gate_learns_alone(tiny_model: Models, tmp_path: Path) -> None:
    """Its loss is that of a head whose gate never opens, and not that of the mixture."""
    config = tiny_config(3)
    teacher = tiny_teacher(tiny_model("llama"), config)
    gated = tiny_trainer(teacher, config, tmp_path / "gated")
    alone = tiny_trainer(teacher, replace(config, copy_gate=False), tmp_path / "alone")
    batch = gated._batch(0)
    mixed, _ = gated._losses(batch)
    set_odds(gated, -99)
    shut, _ = gated._losses(batch)
    torch.testing.assert_close(alone._losses(batch)[0], shut)
    assert not torch.allclose(shut, mixed)
