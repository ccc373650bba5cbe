"""Model files with any value in any place: used, or refused in one short sentence, and soon."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from ppsd.errors import ConfigError, ModelError
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import describe, resolve_model
from ppsd.model.tokenizer import Tokenizer
from ppsd.model.weights import check_shapes, open_source
from tests.support.command import user
from tests.support.gguf_files import CONTROL, NORMAL, add_value, random_model, write_model
from tests.support.tiny_models import SIZES

LONGEST = 2000  # characters of a sentence
SECONDS = 6.0  # of computing; a chat template alone may take 5
SIZE_FIELDS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_context")

NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, -1e308, 5e-324)
TEXTS = ("", "2", "x", "x" * 50_000, "linear", "\ud800", "\x1b[31m", "{{ 1 // 0 }}", "a\nb")
ENDLESS = (float("nan"), float("inf"), -float("inf"))
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *ENDLESS, *TEXTS])
NAMES = st.sampled_from(["a", "type", "rope_type", "factor", "rope_theta", "default", "content"])
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=2), max_size=3)
    | st.sampled_from([[[2]], [1] * 5000, json.loads("[" * 50 + "]" * 50)])
)
KEYS = {
    "config.json": [
        *SIZES,
        *("model_type", "architectures", "head_dim", "sliding_window", "use_sliding_window"),
        *("max_window_layers", "layer_types", "hidden_act", "rms_norm_eps", "attention_bias"),
        *("mlp_bias", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
        *("partial_rotary_factor", "quantization_config", "auto_map", "tokenizer_class"),
        *("num_labels", "id2label", "torch_dtype", "transformers_version", "text_config"),
    ],
    "generation_config.json": [
        *("eos_token_id", "do_sample", "temperature", "top_k", "top_p", "min_p"),
        "repetition_penalty",
    ],
    "tokenizer_config.json": [
        *("chat_template", "tokenizer_class", "auto_map", "added_tokens_decoder", "eos_token"),
        *("bos_token", "pad_token", "unk_token", "model_max_length", "extra_special_tokens"),
        *("additional_special_tokens", "add_bos_token", "clean_up_tokenization_spaces"),
        *("padding_side", "backend", "legacy"),
    ],
}


@pytest.fixture(autouse=True, scope="module")
def no_cache() -> Iterator[None]:
    """Keep nothing: no file here is read twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPSD_CACHE", "/dev/null/cache")
        yield


def tried(path: Path) -> None:
    """Do all that happens to a model's files before its weights are read."""
    start = time.thread_time()
    if refusal := _refusal(path):
        assert len(refusal) < LONGEST
        assert "\n" not in refusal
    assert time.thread_time() - start < SECONDS


def _refusal(path: Path) -> str:
    try:
        files = resolve_model(str(path))
        spec = describe(files)
        for name in SIZE_FIELDS:
            assert type(getattr(spec, name)) is int
            assert getattr(spec, name) > 0
        check_shapes(open_source(path), spec)
        tokenizer = Tokenizer.load(path)
        tokenizer.fit(spec)
        tokenizer.encode("hello")
        tokenizer.encode_chat(user("hello"))
        str(sampling_defaults(files))
    except (ModelError, ConfigError) as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def changed(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, dict[str, Any]], Path]:
    """Give a copy of a family's directory in which one file has other values."""
    root = tmp_path_factory.mktemp("changed")

    def change(family: str, name: str, values: dict[str, Any]) -> Path:
        place = root / family
        if not place.exists():
            shutil.copytree(tiny_model(family), place)
        for file in KEYS:  # the others are as they were
            if (tiny_model(family) / file).exists():
                shutil.copy(tiny_model(family) / file, place / file)
        file = place / name
        record = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(record | values))
        return place

    return change


@settings(max_examples=60)
@given(st.data(), st.sampled_from(["llama", "mistral", "qwen3"]), st.sampled_from(sorted(KEYS)))
def test_any_value_in_a_directory(changed, data: st.DataObject, family: str, name: str) -> None:
    values = data.draw(st.dictionaries(st.sampled_from(KEYS[name]), VALUES, min_size=1, max_size=2))
    tried(changed(family, name, values))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"num_labels": 2**40}),  # transformers makes a name for each
        ("config.json", {"sliding_window": -1}),
        ("config.json", {"sliding_window": 1e-320}),
        ("config.json", {"rope_scaling": {"type": [1] * 5000}}),
        ("tokenizer_config.json", {"model_max_length": {}}),
        ("generation_config.json", {"eos_token_id": {"a": 1}, "temperature": "x" * 50_000}),
    ],
)
def test_values_that_once_went_through(changed, name: str, values: dict[str, Any]) -> None:
    tried(changed("mistral", name, values))


def test_a_tokenizer_that_makes_its_library_panic_is_refused(changed) -> None:
    place = changed("llama", "config.json", {})
    file = place / "tokenizer.json"
    whole = json.loads(file.read_text())
    broken = copy.deepcopy(whole)
    broken["model"]["continuing_subword_prefix"] = "float16"
    try:
        file.write_text(json.dumps(broken))
        with pytest.raises(ModelError, match="has no tokenizer that can be read"):
            Tokenizer.load(place)
    finally:
        file.write_text(json.dumps(whole))


GGUF_KEYS = [
    *(f"llama.{key}" for key in ("block_count", "context_length", "embedding_length")),
    *(f"llama.attention.{key}" for key in ("head_count", "head_count_kv", "key_length")),
    *("llama.attention.layer_norm_rms_epsilon", "llama.attention.sliding_window"),
    *(f"llama.rope.{key}" for key in ("freq_base", "dimension_count", "scale_linear")),
    *(f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length")),
    *("llama.expert_count", "general.architecture", "general.alignment", "general.sampling.temp"),
    *("split.count", "split.no", "split.tensors.count"),
    *("tokenizer.chat_template", "tokenizer.chat_template.../x"),
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "eot", "unknown", "fim_pad")),
    *(f"tokenizer.ggml.add_{key}" for key in ("bos_token", "eos_token", "space_prefix")),
]
FITTING = (True, False, 0, 1, 2, 7, 2**31, 2**32 - 1, 0.5, -0.5, 1e-45, 3e38, *ENDLESS)
WORDS = ("", "x", "y" * 50_000, "gpt2", "yarn", "{{ 1 // 0 }}")
ARRAYS = ([1], ["x"], ["a", "b"], [1.5], [7] * 500, ["x"] * 400)
GGUF_VALUES = st.sampled_from([*FITTING, *WORDS, *ARRAYS])
BYTES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "</s>"]
TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [*BYTES, *(f"[PAD{i}]" for i in range(len(BYTES), 300))],
    "tokenizer.ggml.token_type": [NORMAL] * (len(BYTES) - 2) + [CONTROL] * (302 - len(BYTES)),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Write a tiny GGUF file with other metadata."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = random_model(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}))

    def write(values: dict[str, Any]) -> Path:
        def extend(writer: gguf.GGUFWriter) -> None:
            for key, value in (TOKENIZER | values).items():
                writer.kv_data[0].pop(key, None)
                add_value(writer, key, value)

        write_model(path, model, extend=extend)
        return path

    return write


@settings(max_examples=40)
@example({"tokenizer.ggml.tokens": 7})
@example({"tokenizer.ggml.eot_token_id": "gpt2"})
@example({"llama.attention.head_count_kv": "y" * 50_000})
@given(st.dictionaries(st.sampled_from(GGUF_KEYS), GGUF_VALUES, min_size=1, max_size=2))
def test_any_value_in_a_gguf_file(tiny_gguf, values: dict[str, Any]) -> None:
    tried(tiny_gguf(values))


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.sampled_from([b"\0", b"\xff", b"\x7f", b"\xff" * 8, b"\0\0\0\0\1\0\0\0"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_bytes_in_the_header_of_a_gguf_file(
    tiny_gguf, gguf_bytes: bytes, changes: list[tuple[float, bytes]]
) -> None:
    content, header = bytearray(gguf_bytes), len(gguf_bytes) // 8
    for place, data in changes:
        at = int(place * header)
        content[at : at + len(data)] = data
    path = tiny_gguf({}).with_name("bytes.gguf")
    path.write_bytes(content)
    tried(path)


@pytest.fixture(scope="module")
def gguf_bytes(tiny_gguf) -> bytes:
    """Return the content of the file whose values are as they should be."""
    return tiny_gguf({}).read_bytes()
