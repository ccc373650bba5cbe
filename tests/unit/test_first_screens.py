"""What a newcomer sees first: no verb, --help, models, heads, env, and what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ppsd.cli.app import VERBS, load
from ppsd.cli.display import size
from ppsd.cli.env import LISTED
from ppsd.lab.cli import app as lab
from ppsd.model.head_library import SHIPPED, find_heads, head_directory
from tests.support.tiny_models import save_perfect_head, save_tiny

ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = 80, 24


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """An empty machine: no cache, no heads of one's own, nothing from the hub, no files here."""
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def narrow(ppsd, monkeypatch):
    """Run ``ppsd`` in a terminal of 80 columns, and check that nothing on stdout is wider."""

    def run(*arguments: object):
        result = ppsd(*arguments, columns=COLUMNS)
        if "--json" not in arguments:
            assert max(len(line) for line in result.out.splitlines()) <= COLUMNS
        return result

    return run


def test_without_a_verb_it_shows_how_to_begin(narrow) -> None:
    result = narrow()
    assert (result.code, result.err) == (0, "")
    assert 'ppsd generate "Why is the sky blue?"' in result.out
    named = re.findall(r"^  ppsd (\w+)", result.out, re.MULTILINE)
    assert named == ["generate", "chat", "models", "profile"]


def test_help_lists_every_verb(narrow) -> None:
    result = narrow("--help")
    listed = re.findall(r"^  (\w+) +\S", result.out, re.MULTILINE)
    assert listed == [verb for section in VERBS.values() for verb in section]
    assert [load(verb).name for verb in listed] == listed
    assert result.out.count("\n") < ROWS


def test_the_laboratory_has_first_screens_of_its_own(monkeypatch, capsys) -> None:
    for arguments, verbs in (([], ["efficiency", "simulate"]), (["--help"], lab.COMMAND.verbs)):
        monkeypatch.setattr(sys, "argv", ["ppsd-lab", *arguments])
        assert lab.main() == 0
        out = capsys.readouterr().out
        assert re.findall(r"^  (?:ppsd-lab )?([\w-]+) +\S", out, re.MULTILINE) == verbs
        assert max(map(len, out.splitlines())) <= COLUMNS
    assert [lab.load(verb).name for verb in verbs] == verbs


def test_errors_begin_with_the_name_of_the_command(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["ppsd-lab", "efficiency", "--stages", "1"])
    assert lab.main() == 1
    assert capsys.readouterr().err == "ppsd-lab: stages must be at least 2, got 1\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
@pytest.mark.parametrize("package", ["ppsd", "ppsd.lab"])
def test_the_first_screens_import_nothing_slow(package, arguments) -> None:
    code = (
        f"import sys; from {package}.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'transformers', 'rich', 'pydantic'} & set(sys.modules)\n"
        "print(slow, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stderr == "set()\n"


def test_models_lists_what_can_be_used_with_sizes(narrow, places, monkeypatch) -> None:
    monkeypatch.setattr("ppsd.model.catalog.embedded_file", lambda: None)
    assert "no model is here; give --model a directory" in narrow("models").out
    save_tiny(Path("mine"))
    save_tiny(Path("deep/er/still"), "qwen3")
    save_tiny(Path("too/deep/to/see"))
    Path("broken.gguf").write_text("not one")
    Path("split-00002-of-00002.gguf").write_text("a later part")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "mamba"}')
    Path("other/model.safetensors").touch()
    snapshot = places / "hub" / "models--some--one" / "snapshots" / "abc"
    save_tiny(snapshot, "qwen2")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    result = narrow("models")
    rows = [line.split() for line in result.out.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("mine", "llama", "local"),
        ("some/one", "qwen2", "cache"),
    ]
    assert "not usable: broken.gguf: not a readable GGUF file" in result.err
    assert "not usable: other/config.json: architecture 'mamba' is not supported" in result.err
    assert "split" not in result.err
    records = json.loads(narrow("models", "deep", "--json").out)
    deep, hub = records
    assert (deep["model"], deep["layers"], deep["architecture"]) == ("deep/er/still", 6, "qwen3")
    weights = Path("deep/er/still/model.safetensors")
    assert deep["bytes"] == weights.stat().st_size
    assert (hub["model"], hub["source"]) == ("some/one", "hub cache")


def test_the_embedded_model_is_the_default(narrow, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("ppsd.model.catalog.embedded_file", lambda: tiny_model())
    assert " (the default)" in narrow("models").out
    [record] = json.loads(narrow("models", "--json").out)
    assert (record["model"], record["source"]) == (None, "embedded")


def test_models_refuses_a_directory_that_is_none(ppsd) -> None:
    result = ppsd("models", "nowhere")
    assert (result.code, result.out) == (1, "")
    assert result.err == "ppsd: directory must be a directory that exists, got 'nowhere'\n"


def test_sizes_are_told_in_a_person_s_unit() -> None:
    told = {0: "0 KiB", 99 * 2**10: "99 KiB", 2**20: "1.0 MiB", 94 * 2**20: "94 MiB"}
    assert {n: size(n) for n in told} == told
    assert size(3 * 2**29) == "1.5 GiB"


def test_heads_are_listed_by_names_that_can_be_used(narrow, ppsd, tiny_model, places) -> None:
    head = save_perfect_head(places / "cache" / "heads" / "own" / "first", tiny_model(), 2)
    result = narrow("heads", "list")
    names = re.findall(r"^(\S+/\S+) ", result.out, re.MULTILINE)
    assert len(names) == len(find_heads())
    assert "own/first" in names
    assert head_directory("own/first") == head
    shipped = next(name for name in names if name.startswith("smollm2"))
    assert head_directory(shipped) == SHIPPED / shipped
    assert json.loads(narrow("heads", "list", "--json").out)[-1]["name"] == "own/first"
    assert json.loads(ppsd("heads", "show", "own/first").out)["exit_layer"] == 2
    flags = f"--model {tiny_model()} --head own/first --split 2 --dtype float64 --json -n 4"
    record = json.loads(narrow("generate", "fox", "--raw", *flags.split()).out)
    assert record["exit_layer"] == 2


@pytest.mark.parametrize("columns", [10, 30, 40])
@pytest.mark.parametrize("verb", ["models", "heads list"])
def test_a_narrow_terminal_loses_no_name(ppsd, columns, verb) -> None:
    save_tiny(Path("mine"))
    told = ppsd(*verb.split(), columns=columns).out
    assert told == ppsd(*verb.split(), columns=COLUMNS).out
    assert "--model " in told if verb == "models" else "--head " in told


def test_a_damaged_head_is_told(ppsd, places) -> None:
    place = places / "cache" / "heads" / "torn"
    place.mkdir(parents=True)
    (place / "head.json").write_text("{")
    assert f"damaged: {place}" in ppsd("heads", "list").out


def test_env_prints_what_is_in_force(ppsd, places, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("ppsd.model.kernels._in_use", None)  # decided by a test before, maybe
    monkeypatch.setenv("PPSD_KERNELS", "torch")
    monkeypatch.setenv("PPSD_STAGES", "3")
    monkeypatch.delenv("PPSD_HEAD_DIR", raising=False)
    monkeypatch.setattr("ppsd.model.catalog.embedded_file", lambda: tiny_model())
    out = " ".join(ppsd("env").out.split())
    cache = places / "cache"
    kernels = "kernels PyTorch, for bfloat16 on CPUs cache"
    for told in (kernels, "PPSD_KERNELS torch", "PPSD_HEAD_DIR not set", f"PPSD_CACHE {cache}"):
        assert told in out
    record = json.loads(ppsd("env", "--json").out)
    assert record["cache"] == str(cache)
    assert record["heads"] == str(cache / "heads")
    assert (record["heads_shipped"], record["heads_local"]) == (5, 0)
    assert record["environment"]["PPSD_KERNELS"] == "torch"
    assert record["kernels"] == "PyTorch"
    assert record["environment"].pop("PPSD_STAGES") == "3"
    assert record["default_model"] == tiny_model().name
    assert set(record["versions"]) >= {"torch", "transformers", "tokenizers", "gguf"}
    assert 1 <= record["cores_usable"] <= record["cores"]
    docs = (ROOT / "docs" / "environment.md").read_text()
    assert all(f"`{name}`" in docs for name in record["environment"])


def test_env_lists_no_more_than_a_bug_report_has_room_for(ppsd, tiny_model) -> None:
    for i in range(40):
        Path(f"model-{i:02}").symlink_to(tiny_model())
    listed = json.loads(ppsd("env", "--json").out)["models"]
    assert len(listed) <= LISTED + 1
    assert listed[-1] == "…"
    assert "model-03, " in ppsd("env").out


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    places = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "src").rglob("*.py")]
    named = {name for p in places for name in re.findall(r"ppsd-llm\[([^\]]*)\]", p.read_text())}
    assert named
    assert {part for name in named for part in name.split(",")} <= set(extras)


def test_a_missing_head_is_told_once_something_went_well(ppsd, tiny_model) -> None:
    flags = f"--model {tiny_model()} --dtype float64 --transport inprocess --max-context 40 -n 4"
    missing, long = "no trained exit head fits", "fox " * 200
    failed = ppsd("generate", long, *flags.split())
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("ppsd: prompt must be")
    assert missing not in failed.err
    told = ppsd("generate", "fox", *flags.split()).err
    assert told.index("4 tokens") < told.index(missing)
    talk = ppsd("chat", *flags.split(), stdin=f"{long}\nfox\n{long}\nfox\n").err
    assert talk.count(missing) == 1
    assert talk.index("must be") < talk.index(missing) < talk.rindex("must be")
