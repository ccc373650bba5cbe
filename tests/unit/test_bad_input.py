"""What is refused before anything runs, and in which words: field, value, and what is allowed."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppsd import LLM, SamplingParams
from ppsd.cli import app
from ppsd.config import EngineConfig
from ppsd.engine import build, memory
from ppsd.engine.answer import Completion
from ppsd.engine.choose import planned
from ppsd.errors import (
    ConfigError,
    HeadError,
    InsufficientMemoryError,
    ModelError,
    NonFiniteError,
    UnsupportedModelError,
)
from ppsd.model.passes import Pass
from ppsd.model.stage import Stage
from tests.support.passes import ChangedPass
from tests.support.tiny_models import save_perfect_head

TinyModel = Callable[[str], Path]


def open_llm(model: Path, **settings: object) -> LLM:
    fixed = {"dtype": "float64", "transport": "inprocess", "head": "untrained"}
    fixed |= {"threads_per_stage": 1}
    return LLM(str(model), **fixed | settings)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when weights are loaded or workers started."""

    def refuse(*_: object) -> None:
        raise AssertionError("it went ahead")

    monkeypatch.setattr(build.RunningPipeline, "open", refuse)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stages": 7}, "stages must be an integer in [1, 6], got 7"),
        ({"stages": 0}, "stages must be an integer in [1, 64], got 0"),
        ({"split": (4, 2)}, "split must be ascending layers in [1, 5], got 4,2"),
        ({"split": (6,)}, "split must be ascending layers in [1, 5], got 6"),
        ({"split": (2.5,)}, "split must be an integer in [1, 1024], got 2.5"),
        ({"exit_layer": 0}, "exit_layer must be an integer in [1, 5], got 0"),
        ({"exit_layer": 6}, "exit_layer must be an integer in [1, 5], got 6"),
        ({"exit_layer": "4"}, "exit_layer must be an integer in [1, 5], got '4'"),
        ({"exit_layer": 5, "stages": 3}, "exit_layer must be an integer in [1, 4], got 5"),
        (
            {"exit_layer": 3, "split": (2,)},
            "exit_layer must be the end of stage 0, 2 in this split, got 3",
        ),
        (
            {"mode": "fast"},
            "mode must be one of auto, autoregressive, draft-then-verify, ppsd, got",
        ),
        (
            {"head": "none", "mode": "ppsd"},
            "mode must be autoregressive without a head or lookup, got 'ppsd'",
        ),
        (
            {"stages": 1, "mode": "draft-then-verify"},
            "drafting needs an exit between two stages, got 'draft-then-verify'",
        ),
        *(
            ({"stages": 1, "mode": mode, name: 5}, f"{name} must be 1 with one stage: drafting nee")
            for mode in ("auto", "autoregressive", "draft-then-verify", "ppsd")
            for name in ("block", "in_flight")
        ),
        *(
            (
                {"stages": 1, "mode": mode, "exit_layer": 2},
                "exit_layer must be left out with one st",
            )
            for mode in ("auto", "autoregressive", "ppsd")
        ),
        ({"block": 0}, "block must be an integer in [1, 64], got 0"),
        ({"dtype": "int8"}, "float16, got 'int8'"),
        ({"devices": ("gpu9",)}, "devices must be devices that PyTorch finds here, such as cpu or"),
        ({"devices": ("cpu",) * 3}, "devices must be one device or 2, one a stage, got"),
        ({"max_context": 1}, "max_context must be an integer in [2, 512], what llama"),
        ({"max_context": 513}, "was made for, got 513"),
        ({"max_context": 3.5}, "was made for, got 3.5"),
        ({"timeout": math.nan}, "timeout must be a number of seconds in (0, 1e6], got nan"),
        ({"head": None}, "head must be a text or a path, got None"),
        ({"plan": 5}, "plan must be a text or a path, got 5"),
        ({"chat_template": b"x"}, "chat_template must be a text or a path, got b'x'"),
        ({"transport": "carrier-pigeon"}, "distributed, inprocess, got 'carrier-pigeon'"),
    ],
    ids=str,
)
def test_settings(tiny_model: TinyModel, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_llm(tiny_model("llama"), **settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be a number in [0, 100], got -0.1"),
        ({"temperature": math.nan}, "temperature must be a number in [0, 100], got nan"),
        ({"temperature": "hot"}, "temperature must be a number in [0, 100], got 'hot'"),
        ({"top_k": -2}, "top_k must be an integer in [0, 2147483647], got -2"),
        ({"top_k": 2.5}, "top_k must be an integer in [0, 2147483647], got 2.5"),
        ({"top_p": 0}, "top_p must be a number in (0, 1], got 0"),
        ({"min_p": 1.1}, "min_p must be a number in [0, 1], got 1.1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number in [0.01, 100], got 0"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number in [-2, 2], got 2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty must be a number in [-2, 2], got -3"),
        ({"seed": -1}, "seed must be an integer in [0, 9223372036854775807], got -1"),
        ({"max_tokens": 0}, "max_tokens must be an integer in [1, 2147483647], got 0"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens must be an integer in [0, 5], got 6"),
        ({"n": 0}, "n must be an integer in [1, 1024], got 0"),
        ({"stop": ("",)}, "stop must be non-empty strings of at most 1024 chars, got ''"),
        ({"stop": ("x",) * 17}, "stop must be at most 16 strings, got 17 strings"),
        (
            {"logit_bias": {3: math.inf}},
            "logit_bias must be a number in [-100, 100], got inf",
        ),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be an integer in [0, 2147483647], got -1"),
        (
            {"stop_token_ids": range(1025)},
            "stop_token_ids must be at most 1024 ids, got 1025 ids",
        ),
    ],
    ids=str,
)
def test_sampling_values(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**values)
    assert str(caught.value) == sentence


@pytest.fixture(scope="module")
def llm(tiny_model: TinyModel) -> Iterator[LLM]:
    with open_llm(tiny_model("llama"), max_context=64) as llm:
        yield llm


SHORT = SamplingParams(max_tokens=2, ignore_eos=True)
PROMPTS = [
    ("", "prompt must be of 1 to 63 tokens (the context holds 64), got 0 tokens"),
    ([], "prompt must be of 1 to 63 tokens (the context holds 64), got 0 tokens"),
    ([5] * 64, "prompt must be of 1 to 63 tokens (the context holds 64), got 64 tokens"),
    ("x" * 500, "(the context holds 64), got 500 tokens"),
    ([-1], "prompt token id must be an integer in [0, 295], got -1"),
    ([299], "prompt token id must be an integer in [0, 295], got 299"),
    ([2**63], "prompt token id must be an integer in [0, 295], got 9223372036854775808"),
    ([True], "prompt token id must be an integer in [0, 295], got True"),
    ([[5], []], "prompt must be of 1 to 63 tokens (the context holds 64), got 0 tokens"),
    (5, "prompt must be a text, token ids or chat messages, got 5"),
    ("\udcff", "prompt must be valid Unicode, without lone surrogates, got '\\udcff'"),
    (
        [{"role": "user", "content": None}],
        "message must be a mapping of texts with role and content",
    ),
    (
        [{"role": "user", "content": "hi"}, 5],
        "message must be a mapping of texts with role and content",
    ),
]


@pytest.mark.parametrize(("prompt", "sentence"), PROMPTS, ids=range(len(PROMPTS)))
def test_prompts(llm: LLM, prompt: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        llm.generate(prompt)
    assert sentence in str(caught.value)


ROOM = "prompt must be of 1 to 63 tokens (the context holds 64), got"
NUMBER = "prompt token id must be an integer in [0, 295], got"
IDS = [
    ([], ROOM),
    ([5] * 64, ROOM),
    ([10**9], NUMBER),
    ([-1], NUMBER),
    (["a"], NUMBER),
    ([{"role": "user", "content": "hi"}], NUMBER),
    ("abc", "prompt must be token ids, got 'abc'"),
    (None, "prompt must be token ids, got None"),
]


@pytest.mark.parametrize(("prompt", "sentence"), IDS, ids=str)
def test_token_ids_that_are_run(llm: LLM, prompt: object, sentence: str) -> None:
    """Nothing but ids, refused before they reach a stage, and the next request is answered."""
    for act in (lambda: llm.run(prompt, SHORT), lambda: llm.run_all([[5], prompt], SHORT)):
        with pytest.raises(ConfigError) as caught:
            act()
        assert str(caught.value).startswith(sentence)
    assert llm.run([5, 6], SHORT).stats.new_tokens == 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"n": 2}, "n must be 1 at temperature 0, where all samples are equal, got 2"),
        ({"logit_bias": {296: 1.0}}, "logit_bias token id must be in [0, 295], the model's vocab"),
        ({"stop_token_ids": (296,)}, "stop token id must be in [0, 295], the model's vocabulary"),
    ],
    ids=str,
)
def test_a_refused_request_harms_nobody(llm: LLM, values: dict[str, object], sentence: str) -> None:
    before = llm.generate([5, 6], SamplingParams(max_tokens=4))[0].token_ids
    with pytest.raises(ConfigError) as caught:
        llm.generate([5, 6], SamplingParams(**values))
    assert sentence in str(caught.value)
    assert llm.generate([5, 6], SamplingParams(max_tokens=4))[0].token_ids == before


def test_the_context_may_be_filled_to_the_last_position(llm: LLM) -> None:
    (completion,) = llm.generate([5] * 63, SamplingParams(max_tokens=9, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


@pytest.mark.usefixtures("nothing_runs")
def test_models_that_are_missing_damaged_or_foreign(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model '/no/such' does not exist; allowed are a directo"):
        open_llm(Path("/no/such"))
    copy = Path(shutil.copytree(tiny_model("llama"), tmp_path / "copy"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match=f"{weights}: not a readable safetensors file"):
        open_llm(copy)
    weights.unlink()
    with pytest.raises(ModelError, match=f"{copy}: has neither model.safetensors nor"):
        open_llm(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba' is not supported; supp"):
        open_llm(copy)


@pytest.mark.usefixtures("nothing_runs")
def test_a_model_without_a_matrix_is_not_planned(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model("llama"), tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        planned(EngineConfig(model=str(copy)))


@pytest.mark.usefixtures("nothing_runs")
def test_heads_of_another_model_or_exit(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    head = str(save_perfect_head(tmp_path / "head", model, 3))
    with pytest.raises(HeadError, match="reads layer 3, but stage 0 ends at layer 2; choose"):
        open_llm(model, split=(2,), head=head)
    with pytest.raises(HeadError, match=r"belongs to .*, not to .*: the final norm differs in"):
        open_llm(tiny_model("qwen2"), head=head)
    with pytest.raises(HeadError, match=r"no exit head at /no/such: head.json is missing"):
        open_llm(model, head="/no/such")


@pytest.mark.usefixtures("nothing_runs")
def test_memory_is_estimated_before_loading(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=600 << 20)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)
    numbers = r"about 0\.68 GiB here \(stage 0 0\.39, stage 1 0\.29\), but 0\.59 GiB are free"
    with pytest.raises(InsufficientMemoryError, match=numbers):
        open_llm(tiny_model("llama"), transport="shared-memory")
    fewer = r"free; use fewer concurrent requests \(8 now\), a narrower dtype"
    with pytest.raises(InsufficientMemoryError, match=fewer):
        open_llm(tiny_model("llama"), transport="shared-memory", concurrent=8)
    monkeypatch.setenv("RANK", "0")  # the other stages are, for all we know, on other hosts
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match="it went ahead"):
        open_llm(tiny_model("llama"), transport="auto")


@pytest.mark.parametrize(("stage", "first"), [(0, 0), (1, 2), (2, 4)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_a_number_is_never_sampled(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, stage: int, first: int, value: float
) -> None:
    original = Stage.start

    def starting(self: Stage, inputs: torch.Tensor, position: int, slot: int = 0) -> Pass:
        def spoil(hidden: torch.Tensor) -> torch.Tensor:
            hidden[9 - position] = value
            return hidden

        work = original(self, inputs, position, slot)
        hit = self.plan.first == first and position + len(inputs) > 9
        return ChangedPass(work, spoil) if hit else work

    monkeypatch.setattr(Stage, "start", starting)
    with open_llm(tiny_model("llama"), split=(2, 4)) as llm:
        with pytest.raises(NonFiniteError, match=f"stage {stage} computed NaN .* position 9$"):
            llm.generate(list(range(3, 15)))
        with pytest.raises(NonFiniteError, match=f"stage {stage} computed"):
            llm.generate([5])


def test_a_head_of_nonsense_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    head = save_perfect_head(tmp_path / "head", model, 2, sign=1e308)
    with open_llm(model, head=str(head)) as llm, pytest.raises(NonFiniteError, match="exit head"):
        llm.generate([5, 6])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", ""], "prompt must be a non-empty text, got ''"),
        (["generate", "hi", "-m", "/no/such"], "model '/no/such' does not exist; allowed are"),
        (["generate", "hi", "--top-p", "2"], "top_p must be a number in (0, 1], got 2.0"),
        (["generate", "hi", "--split", "a"], "split must be integers separated by commas, got"),
    ],
    ids=lambda value: value[-1],
)
def test_the_command_line_says_it_in_one_line(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("sys.argv", ["ppsd", *arguments])
    assert app.main() == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ppsd: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"), [("stop", 5), ("stop", [5]), ("logit_bias", [1.0]), ("logit_bias", 2)]
)
def test_sampling_fields_of_another_type_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sink_that_raises_ends_its_own_request(tiny_model: TinyModel, rows: int) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    with open_llm(tiny_model("llama"), concurrent=2, rows=rows) as llm:
        [expected] = llm.generate([5, 6, 7], params)
        failed: list[BaseException] = []

        def sink(position: int, row: torch.Tensor) -> None:
            if position > 6:
                raise ValueError("mine")

        def run() -> None:
            try:
                llm.run([5, 6], params, logits=sink)
            except ValueError as error:
                failed.append(error)

        for _ in range(2):
            other = threading.Thread(target=run)
            other.start()
            [found] = llm.generate([5, 6, 7], params)
            other.join(60.0)
            assert found.token_ids == expected.token_ids
        assert list(map(str, failed)) == ["mine"] * 2


def test_what_stages_did_for_others_is_not_told_as_a_requests_own(tiny_model: TinyModel) -> None:
    with open_llm(tiny_model("llama"), concurrent=2) as llm:
        lengths = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (40, 8))
        streams = [llm.stream([5, 6, 7], params) for params in lengths]
        for stream in streams:
            next(stream)
        assert [finish(stream).stats.stages for stream in streams] == [(), ()]
        [alone] = llm.generate([5, 6, 7], SamplingParams(max_tokens=8))
        assert len(alone.stats.stages) == 2
        assert all(stage.busy_share <= 1 for stage in alone.stats.stages)


def finish(stream: Generator[object, None, Completion]) -> Completion:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            completion: Completion = end.value
            return completion
