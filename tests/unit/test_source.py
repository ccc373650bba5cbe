"""Finding models: what a name may mean, the default, and one-sentence errors without a network."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import errors

from ppsd.errors import ModelError, UnsupportedModelError
from ppsd.model import source
from ppsd.model.defaults import sampling_defaults
from ppsd.model.source import ModelFiles, describe, resolve_model
from ppsd.model.tokenizer import Tokenizer
from ppsd.model.weights import open_source

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "eos_token_id": 2}


def _directory(path: Path, **changes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


@pytest.fixture
def no_download(monkeypatch):
    def refuse(hub_id: str) -> Path:
        raise AssertionError(f"tried to download {hub_id}")

    monkeypatch.setattr(source, "_download", refuse)


@pytest.mark.usefixtures("no_download")
def test_local_directories_and_files_come_first(tmp_path, monkeypatch):
    _directory(tmp_path / "owner").joinpath("name").mkdir()
    _directory(tmp_path / "owner" / "name")
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name") == ModelFiles("name", Path("owner/name"), is_gguf=False)
    assert resolve_model("./x.gguf") == ModelFiles("x", Path("x.gguf"), is_gguf=True)


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/model", "'/no/such/model' does not exist"),
        ("./models/missing", "does not exist; allowed are a directory"),
        ("a/b/c", "does not exist"),
        ("gpt2", "does not exist"),
        ("owner/model.gguf", "does not exist"),
        ("", "model '' does not exist; allowed are a directory with config.json"),
        ("x" * 5000, r"model 'x{200}.* cannot be read \(File name too long\)"),
        ("empty", "empty: this directory has no config.json"),
        ("weights.bin", "weights.bin: a model must be a directory or a file that ends in .gguf"),
    ],
)
def test_what_cannot_be_a_model_is_refused_without_a_network(tmp_path, monkeypatch, name, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=words):
        resolve_model(name)


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        (errors.GatedRepoError, "access is gated"),
        (errors.RepositoryNotFoundError, "neither a local"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (errors.OfflineModeIsEnabled, "cannot be reached"),
    ],
)
def test_hub_failures_are_one_line_and_not_retried(monkeypatch, kind, hint):
    calls = []

    def fail(hub_id, **options):
        calls.append((hub_id, "*.bin" in options["allow_patterns"]))
        raise kind.__new__(kind, "two\nlines")  # without the response its constructor wants

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=f"'owner/name'.*{hint}") as caught:
        resolve_model("owner/name")
    assert "\n" not in str(caught.value)
    assert calls == [("owner/name", False)]


def test_a_pipe_is_no_configuration_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config.json: not a regular file"):
        source.read_json(tmp_path / "config.json")


def test_a_directory_is_one_whatever_its_name(tmp_path, tiny_model):
    place = tmp_path / "tiny.gguf"
    shutil.copytree(tiny_model(), place)
    files = resolve_model(str(place))
    assert not files.is_gguf
    assert open_source(files.path).shapes()
    assert Tokenizer.load(files.path).encode("a")


def test_without_the_embedded_file_the_default_is_its_hub_id(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "DEFAULT_PACKAGE", "no_such_package_here")
    monkeypatch.setattr(source, "_download", lambda hub_id: tmp_path / hub_id)
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model(None) == ModelFiles(hub_id, tmp_path / hub_id, is_gguf=False)


def test_embedded_file_is_found_unimported_and_its_hash_checked(monkeypatch, tmp_path):
    package = tmp_path / "fake_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / source.DEFAULT_FILE).write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "DEFAULT_PACKAGE", "fake_weights")
    with pytest.raises(ModelError, match=r"SHA-256 is ba7816bf.*reinstall"):
        resolve_model(None)
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(source, "DEFAULT_SHA256", sha)
    files = resolve_model(None)
    assert files.path == package / source.DEFAULT_FILE
    assert files.is_gguf
    assert "fake_weights" not in sys.modules


def test_directory_is_described_with_both_eos_sources_and_no_remote_code(tmp_path):
    path = _directory(tmp_path / "m", auto_map={"AutoConfig": "evil.Config"}, head_dim=32)
    (path / "evil.py").write_text("raise RuntimeError('executed')")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    spec = describe(resolve_model(str(path)))
    assert (spec.name, spec.hidden_size, spec.head_dim, spec.eos_ids) == ("m", 64, 32, (2, 7))


def test_a_directory_that_is_no_model_says_what_it_is(tmp_path):
    def told(path: Path) -> str:
        with pytest.raises(ModelError, match=r"no config\.json") as caught:
            resolve_model(str(path))
        return str(caught.value)

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "it is an adapter: merge it into its model" in told(adapter)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "b.gguf").write_bytes(b"")
    assert f"holds 1 GGUF file: give {quantised / 'b.gguf'}" in told(quantised)
    (quantised / "a.gguf").write_bytes(b"")
    assert f"holds 2 GGUF files: give {quantised / 'a.gguf'}" in told(quantised)
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    _directory(snapshot)
    (snapshot / "onnx").mkdir()
    for off in (cache, snapshot.parent, cache / "blobs", cache.parent, snapshot / "onnx"):
        assert f"; give {snapshot}, which has one" in told(off)
    with pytest.raises(ModelError, match=f"ends in .gguf; give its directory, {snapshot}"):
        resolve_model(str(snapshot / "config.json"))


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' + NESTED + "}", "not readable as JSON"),
        ("{", "config.json: not readable as JSON"),
        ("[1]", "must hold a JSON object, got list"),
    ],
)
def test_damaged_config_is_named(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        describe(resolve_model(str(tmp_path)))


def test_other_architectures_are_listed_against(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"config.json: architecture 'mamba'.*Qwen3"):
        describe(resolve_model(str(_directory(tmp_path, model_type="mamba"))))


def test_a_named_pipe_holds_no_sampling_defaults(tmp_path):
    path = _directory(tmp_path / "m")
    os.mkfifo(path / "generation_config.json")
    files = ModelFiles("m", path, is_gguf=False)
    assert sampling_defaults(files).values == {}
    assert describe(files)
