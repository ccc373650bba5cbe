"""Self-generation says what transformers says in any batch, and continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppsd.errors import PpsdError
from ppsd.model.runners import CompiledRunner
from ppsd.train import selfgen, targets
from ppsd.train.batched import teacher_forward
from ppsd.train.data import encode_all, make_batch
from ppsd.train.features import FeatureStore
from ppsd.train.records import Record, read_data
from ppsd.train.run import Teacher, load_teacher
from ppsd.train.selfgen import BatchGenerator, GenerateConfig, Request
from ppsd.train.settings import DistillConfig
from ppsd.train.targets import GenerateReport, write_targets
from tests.support.teachers import tiny_config, tiny_teacher
from tests.support.tiny_models import VOCAB, reference_generate

PROMPTS = [[5 + i, *range(20, 20 + (7 * i) % 11)] for i in range(9)]
REQUESTS = [Request(f"{i:x}", prompt) for i, prompt in enumerate(PROMPTS)]
NEW = 12


@pytest.fixture
def teacher(tiny_model: Callable[[str], Path]) -> Teacher:
    return tiny_teacher(tiny_model("llama"), tiny_config())


def answers(teacher: Teacher, config: GenerateConfig, **changes: object) -> dict[str, list[int]]:
    settings = {"eos_ids": {2}, "vocab_size": VOCAB - 4, "max_length": 64, **changes}
    generator = BatchGenerator(teacher.stage, config, **settings)
    return {answer.request.key: answer.ids for answer in generator.run(REQUESTS)}


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_greedy_equals_transformers(
    teacher: Teacher, tiny_model: Callable[[str], Path], batch: int
) -> None:
    found = answers(teacher, GenerateConfig(batch, NEW))
    for request in REQUESTS:
        plain = reference_generate(tiny_model("llama"), list(request.prompt), NEW)
        assert found[request.key] == plain


def test_rows_that_end_early_do_not_disturb_the_others(teacher: Teacher) -> None:
    plain = answers(teacher, GenerateConfig(64, NEW))
    ends = {ids[i % 5] for i, ids in enumerate(plain.values())}
    stopped = answers(teacher, GenerateConfig(3, NEW), eos_ids=ends)
    for key, ids in plain.items():
        end = next((i for i, token in enumerate(ids) if token in ends), NEW - 1)
        assert stopped[key] == ids[: end + 1]
    assert len({len(ids) for ids in stopped.values()}) > 2


def test_reading_prompts_is_told_and_ends_at_the_deadline(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts can take longer to read than answers to write."""
    monkeypatch.setitem(selfgen.PREFILL_TOKENS, "cpu", 1)  # one prompt at a time
    now, told = iter(range(100)), []
    monkeypatch.setattr(selfgen.time, "monotonic", lambda: next(now))
    generator = BatchGenerator(
        teacher.stage, GenerateConfig(64, NEW), eos_ids={2}, vocab_size=VOCAB, max_length=64,
        deadline=2.0, stepped=lambda: told.append((generator.read, generator.written)),
    )  # fmt: skip
    assert len(list(generator.run(REQUESTS))) == 3
    lengths = [len(prompt) for prompt in PROMPTS]
    assert told[:3] == [(sum(lengths[: n + 1]), n + 1) for n in range(3)]


def test_complete_answers_are_not_under_way(teacher: Teacher) -> None:
    """Continued after a kill, they would go on behind their end."""
    saved: list[int] = []
    generator = BatchGenerator(
        teacher.stage, GenerateConfig(2, 3), eos_ids={2}, vocab_size=VOCAB, max_length=64,
        stepped=lambda: saved.extend(map(len, generator.under_way().values())),
    )  # fmt: skip
    assert [len(answer.ids) for answer in generator.run(REQUESTS)] == [3] * len(REQUESTS)
    assert set(saved) == {1, 2}


def test_the_context_limits_answers(teacher: Teacher) -> None:
    found = answers(teacher, GenerateConfig(4, NEW), max_length=14)
    assert [len(found[r.key]) for r in REQUESTS] == [min(NEW, 14 - len(p)) for p in PROMPTS]


def test_sampling_depends_on_seed_and_prompt_not_on_the_batch(teacher: Teacher) -> None:
    one, many = (answers(teacher, GenerateConfig(b, NEW, 1.0, seed=5)) for b in (1, 64))
    other = answers(teacher, GenerateConfig(64, NEW, 1.0, seed=6))
    assert one == many
    assert sum(other[key] != many[key] for key in many) > len(many) // 2


def records(count: int) -> list[Record]:
    return [Record("here", ({"role": "user", "content": f"box {i}"},)) for i in range(count)]


def write(teacher: Teacher, path: Path, rows: list[Record], **changes: object) -> int:
    config = GenerateConfig(**{"batch": 4, "max_new": 6, **changes})
    reports: list[GenerateReport] = []
    write_targets(teacher.stage, rows, teacher.encoding, config, path, reports.append)
    assert reports[-1].done == reports[-1].total
    return reports[-1].tokens


def test_a_stopped_file_is_continued(teacher: Teacher, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(teacher, whole, records(10))
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:4]) + lines[4][:25])  # killed while writing
    written = write(teacher, cut, [*records(10), *records(3)])
    assert written == sum(len(json.loads(line)["target_ids"]) for line in lines[4:])
    assert sorted(cut.read_text().splitlines()) == sorted(line.strip() for line in lines)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_under_way_survive_a_kill(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(targets, "SAVE_EVERY_S", 0.0)
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    settings = {"max_new": 12, "temperature": temperature}
    total = write(teacher, whole, records(6), **settings)
    reports: list[GenerateReport] = []

    def stop_in_the_middle(report: GenerateReport) -> None:
        reports.append(report)
        if report.tokens > 20:
            raise KeyboardInterrupt

    config = GenerateConfig(batch=4, **settings)
    with pytest.raises(KeyboardInterrupt):
        write_targets(teacher.stage, records(6), teacher.encoding, config, cut, stop_in_the_middle)
    assert not cut.exists()
    assert [r.share for r in reports] == sorted(r.share for r in reports)
    assert 0 < reports[-1].share < 1
    assert write(teacher, cut, records(6), **settings) == total - 20
    assert sorted(cut.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    assert not list(tmp_path.glob("*.under-way*"))


def kept(path: Path) -> dict[str, int]:
    """Return how many tokens of each answer under way are saved."""
    draft = json.loads(path.with_name(path.name + targets.UNDER_WAY).read_text())
    return {key: len(ids) for key, ids in draft["answers"].items()}


@pytest.mark.parametrize("pool", [12, 1024])
@pytest.mark.parametrize("prefill", [1, 1024])
def test_a_second_kill_loses_nothing(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: int, prefill: int
) -> None:
    """Prompts read one by one let the draft be saved while most answers wait to go on."""
    monkeypatch.setattr(targets, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(targets, "POOL", pool)
    monkeypatch.setitem(selfgen.PREFILL_TOKENS, "cpu", prefill)
    path = tmp_path / "x.jsonl"
    texts = ["box " * (1 + i % 9) + str(i) for i in range(48)]
    prompts = [Record("here", ({"role": "user", "content": text},)) for text in texts]
    config = GenerateConfig(batch=4, max_new=12)

    def until(stop: Callable[[GenerateReport], bool], deadline: float = float("inf")) -> None:
        def report(now: GenerateReport) -> None:
            if stop(now):
                raise KeyboardInterrupt

        write_targets(
            teacher.stage, prompts, teacher.encoding, config, path, report, deadline=deadline
        )

    with pytest.raises(KeyboardInterrupt):
        until(lambda now: now.done >= 12 and now.tokens >= 12 * 12 + 4 * 7)
    begun = kept(path)
    assert len(begun) == 4
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):  # told of before it is saved, so once more
        until(lambda now: now.read > 0 and (told.append(now.read) or len(told) > 1))
    assert begun.items() <= {key: min(n, begun[key]) for key, n in kept(path).items()}.items()
    until(lambda now: False, deadline=0.0)  # no time to take any of them up
    assert begun.keys() == kept(path).keys()
    until(lambda now: False)
    assert not list(tmp_path.glob("*.under-way*"))
    assert len(path.read_text().splitlines()) == 48


def test_answers_under_way_of_other_settings_are_forgotten(
    teacher: Teacher, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    draft = path.with_name("x.jsonl.under-way.json")
    for content in ('{"stamp": {}, "answers": {}}', "{", "[]", '{"stamp": 1}'):
        draft.write_text(content)
        assert write(teacher, path, records(1)) > 0
        path.unlink()
        assert not draft.exists()


def test_its_output_is_training_data_of_the_same_tokens(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(teacher, path, records(5))
    found, _ = read_data([str(path)])
    examples = encode_all(found, teacher.encoding).examples
    written = [json.loads(line)["target_ids"] for line in path.read_text().splitlines()]
    assert [e.targets.tolist() for e in examples] == written


def test_rows_kept_while_writing_are_those_of_a_forward(teacher: Teacher, tmp_path: Path) -> None:
    path, layers = tmp_path / "x.jsonl", (1, 2)
    store = FeatureStore(tmp_path / "rows", teacher.stage, layers, teacher.compute)
    config = GenerateConfig(batch=4, max_new=6)
    rows = [Record("here", ({"role": "user", "content": "box " * (i + 1)},)) for i in range(9)]
    write_targets(
        teacher.stage, rows, teacher.encoding, config, path, lambda report: None, features=store
    )
    examples = encode_all(read_data([str(path)])[0], teacher.encoding).examples
    again = FeatureStore(tmp_path / "rows", teacher.stage, layers, teacher.compute)
    again.fill(examples, lambda done, total: pytest.fail("a row is missing"))
    for example in examples:
        kept = again(make_batch([example], teacher.stage.plan.device))
        alone = teacher_forward(teacher.stage, example.tokens.long()[None], layers)
        for found, rows_ in ((kept.exits[1], alone.exits[1]), (kept.last, alone.last)):
            assert not found[-1].any()  # nothing was guessed from the last token
            torch.testing.assert_close(found[:-1], rows_[:-1], rtol=2**-7, atol=1e-6)


def test_compiled_kernels_write_what_a_forward_reads() -> None:
    """Twenty sequences are two calls of the kernels, each at a position of its own."""
    settings = DistillConfig((8,), dtype="bfloat16", max_length=64, draft_vocab=0)
    stage = load_teacher(None, settings, "cpu").stage
    requests = [Request(f"{i:x}", range(400 * i, 401 * i + 3)) for i in range(20)]
    generator = BatchGenerator(
        stage, GenerateConfig(20, 4), eos_ids=(), vocab_size=stage.spec.vocab_size,
        max_length=64, keep=(8, 30),
    )  # fmt: skip
    for answer in generator.run(requests):
        tokens = torch.tensor([[*answer.request.prompt, *answer.ids]])
        alone = teacher_forward(stage, tokens, (8,))
        for layer, rows in ((8, alone.exits[8]), (30, alone.last)):
            difference = (answer.rows[layer] - rows)[:-1].float().norm(dim=1)
            assert (difference < 0.15 * rows[:-1].float().norm(dim=1)).all()
        scores = stage.logits(alone.last[-len(answer.ids) - 1 : -1]).float()
        chosen = scores.gather(1, tokens[:, -len(answer.ids) :].T)[:, 0]
        assert (chosen > scores.amax(1) - 0.5).all()
    assert isinstance(generator._runner, CompiledRunner)


def test_files_of_other_settings_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write(teacher, path, records(2))
    other = replace(teacher, encoding=replace(teacher.encoding, max_length=20))
    with pytest.raises(PpsdError, match=r"was written with max_length \d+, not 20"):
        write(other, path, records(4))
    other = replace(teacher, encoding=replace(teacher.encoding, raw=True))
    with pytest.raises(PpsdError, match=r"was written with raw False, not True"):
        write(other, path, records(4))
    with pytest.raises(PpsdError, match=r"was written with temperature 0\.0, not 0\.5"):
        write(teacher, path, records(2), temperature=0.5)
    path.write_text("{}\n")
    with pytest.raises(PpsdError, match="does not hold self-generated targets"):
        write(teacher, path, records(2))
    with pytest.raises(PpsdError, match="needs prompts"):
        write(teacher, path, [Record("here", text="plain")])


def test_the_lowest_temperature_is_nearly_greedy(teacher: Teacher) -> None:
    greedy, cold = (answers(teacher, GenerateConfig(4, NEW, t)) for t in (0.0, 1e-30))
    assert cold == greedy
