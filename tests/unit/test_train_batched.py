"""The batched teacher against the textbook forward, and heads in training against inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ppsd.model.exit_head import load_head
from ppsd.model.head_files import HeadConfig, save_head
from ppsd.model.names import layer_prefix
from ppsd.model.stage import StagePlan, fuse_layer
from ppsd.model.weights import open_source
from ppsd.train.batched import teacher_forward, teacher_rows, whole_sequences
from ppsd.train.data import make_batch
from ppsd.train.student import Options, Student, unfuse_layer
from tests.support.reference_model import reference_logits
from tests.support.teachers import random_examples, tiny_config, tiny_teacher
from tests.support.tiny_models import FAMILIES

Models = Callable[[str], Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_equals_the_textbook_forward(tiny_model: Models, family: str) -> None:
    path = tiny_model(family)
    stage = tiny_teacher(path, tiny_config()).stage
    examples = random_examples(3)
    batch = make_batch(examples, torch.device("cpu"))
    rows = teacher_rows(stage, teacher_forward(stage, batch.tokens, ()), batch.rows)
    expected = [
        reference_logits(stage.spec, open_source(path), e.tokens.long(), torch.float64)[
            e.start - 1 : -1
        ]
        for e in examples
    ]
    assert stage.lm_head is not None
    torch.testing.assert_close(rows @ stage.lm_head.T, torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama-biased", "qwen3"])
def test_unfusing_undoes_fusing(tiny_model: Models, family: str) -> None:
    path = tiny_model(family)
    stage = tiny_teacher(path, tiny_config()).stage
    prefix = layer_prefix(2)
    stored = {
        prefix + name: open_source(path).load(prefix + name, torch.float64)
        for name in stage.spec.layer_shapes()
    }
    unfused = unfuse_layer(fuse_layer(dict(stored), prefix), stage.spec, prefix)
    assert unfused.keys() == stored.keys()
    assert all(torch.equal(unfused[name], stored[name]) for name in stored)


@pytest.mark.parametrize(
    ("layers", "options"),
    [(0, Options()), (2, Options()), (2, Options(8, feedback=True, copy_gate=True))],
)
def test_an_exported_head_says_in_inference_what_it_said_in_training(
    tiny_model: Models, tmp_path: Path, layers: int, options: Options
) -> None:
    path = tiny_model("llama-biased")
    teacher = tiny_teacher(path, tiny_config())
    stage = teacher.stage
    student = Student(stage, 3, layers, 2, options)
    with torch.no_grad():
        for _, parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(0, 290, (1, 11))
    features = teacher_forward(stage, tokens, (3,))
    hidden, verified = features.exits[3], features.last.flip(0)  # any rows will do
    rope = whole_sequences(stage.rope, 1, 11)
    draft_ids = torch.tensor([1, 5, 200])
    kind = "transformer" if layers else "norm"
    config = HeadConfig(kind, 3, layers, 3, "tiny", teacher.fingerprint, **asdict(options))
    save_head(tmp_path, config, student.export() | {"draft_ids": draft_ids})

    plan = StagePlan(0, 3, 32, torch.float64, torch.device("cpu"))
    head = load_head(tmp_path, stage.spec, plan, open_source(path), teacher.identity)
    finished = head.finish(head.forward(hidden, 0), verified)
    said, odds = head.logits(finished, 0)[:, draft_ids], head.copy_odds(finished)
    slots = torch.arange(11)
    assert stage.lm_head is not None
    with torch.no_grad():
        normed = student.forward(hidden, verified, rope, 1, torch.arange(11))
        trained = student.odds(normed, slots)
    torch.testing.assert_close(odds[slots, slots], trained, rtol=1e-9, atol=1e-9, check_dtype=False)
    torch.testing.assert_close(said, normed @ stage.lm_head[draft_ids].T, rtol=1e-9, atol=1e-9)
