"""The frozen command lines: verbs and flags of both commands, and what sets a flag's value.

Renaming a flag breaks scripts: the lists here change only on purpose.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from ppsd.cli import app as product
from ppsd.cli.settings import ALL, EXPERTS, Sampling, check_environment, settings_of
from ppsd.config import Decoding, EngineConfig, Placement
from ppsd.errors import ConfigError, PpsdError
from ppsd.lab.cli import app as laboratory
from ppsd.serve.config import ServerConfig
from ppsd.types import SamplingParams
from tests.support.command import ppsd as run

PLACEMENT = (
    "--model -m --chat-template --stages --split --dtype --devices --threads-per-stage "
    "--max-context --concurrent --transport --prefill-chunk --pace --escape-special --timeout "
    "--init-timeout"
)
DECODING = (
    "--mode --head --exit-layer --plan --block --in-flight --rows --heads --acceptance --lookup "
    "--no-lookup "
    "--gate --no-gate --force-head"
)
SAMPLING = (
    "--temperature -t --top-k --top-p --min-p --repetition-penalty --presence-penalty "
    "--frequency-penalty --logit-bias --seed --stop --stop-token-ids --ignore-eos --max-tokens -n "
    "--min-tokens"
)
PIPELINE = f"{PLACEMENT} {DECODING} --config"
HERE = PLACEMENT.replace(" --concurrent", "")
ORACLE = f"{HERE} --plan --acceptance --config --prompts --limit --tokens --repeats --out --json"
TASKS = (
    (f"{PIPELINE} --prompts --limit --max-tokens -n --repeats --out --memory --json")
    .replace(" --mode", "")
    .replace(" --block", "")
    .replace(" --in-flight", "")
    .replace(" --concurrent", "")
)
PRODUCT = {
    "generate": f"{PIPELINE} {SAMPLING} prompt --raw --system --samples --highlight --stats --json "
    "--trace",
    "chat": f"{PIPELINE} {SAMPLING} --system --highlight --stats",
    "serve": f"{PIPELINE} --host --port --api-key --api-key-file --insecure --served-model-name "
    "--max-queue --drain-timeout --metrics-prefix --log-format --print-config "
    "--ssl-certfile --ssl-keyfile",
    "models": "directory --json",
    "heads list": "--json",
    "heads show": "head",
    "env": "--json",
    "profile": "--model -m --dtype --stages --threads-per-stage --transport --config --out --json",
    "plan": "--model -m --workers --profile --hardware --worker-speed --link-ms --context --load "
    "--dtype --threads-per-stage --alpha --split --exit-layer --mode --block --in-flight --top "
    "--every-split --json",
    "distill": "--exit-layer --head --head-mlp --draft-vocab --start --learning-rate --epochs "
    "--minutes --batch-tokens --seed --dtype --max-length --all-positions --raw --chat-template "
    "--validation --self-generate --generate-only --generate-batch --max-new --temperature --data "
    "--vocab-data --out --model -m --features --device --threads --validate-every "
    "--checkpoint-every",
    "verify": f"{PIPELINE} {SAMPLING} prompts --limit --json",
    "acceptance": "--head --data --out --model -m --limit --max-tokens -n --temperature -t --seed "
    "--raw --chat-template --lookup --decode --stages --max-length --dtype --device --threads "
    "--generate-batch --batch-tokens --by --record --json",
}
LABORATORY = {
    "efficiency": f"{ORACLE} --exit-layer --in-flight --alphas --memory",
    "predict": f"{ORACLE} --exit-layer --block --alphas --profile --no-profile",
    "splits": f"{ORACLE} --alpha".replace(" --split", "").replace(" --pace", ""),
    "endurance": f"{ORACLE} --exit-layer --requests".replace(" --pace", ""),
    "tasks": f"{TASKS} --gammas --variants --sampled --virtual",
    "baselines": TASKS,
    "knn-ssd-search": "--model -m --chat-template --dtype --threads-per-stage --max-context "
    "--config --prompts --limit --evaluations --samples --max-tokens -n --centres --out --json",
    "load": f"{TASKS} --concurrent --virtual".replace(" --repeats", "").replace(" --memory", ""),
    "simulate": "--stages --layers --exit-layer --alpha --trace --block --in-flight --rows "
    "--tokens "
    "--prompt-tokens --seed --jitter --model --hardware --layer-ms --head-ms --lm-head-ms --hop-ms "
    "--overhead-ms --row-cost --sweep --csv --plot --gantt --json",
    "paper": "--out --tokens --seed",
    "report": "results --out --trace",
}
COMMANDS = {"ppsd": (product, PRODUCT), "ppsd-lab": (laboratory, LABORATORY)}
ROOT = Path(__file__).parents[2]


def parameters(command: Any) -> dict[str, list[Any]]:
    """The flags of each verb, of ``heads list`` by that name."""
    found = {}
    for verb in command.COMMAND.verbs:
        loaded = command.load(verb)
        for name, each in getattr(loaded, "commands", {"": loaded}).items():
            flags = [p for p in each.params if p.name != "help"]
            found[f"{verb} {name}".strip()] = flags
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_verbs_and_flags_are_frozen_and_explained(name) -> None:
    command, frozen = COMMANDS[name]
    found = parameters(command)
    assert {
        verb: sorted(n for p in flags for n in [*p.opts, *p.secondary_opts])
        for verb, flags in found.items()
    } == {verb: sorted(flags.split()) for verb, flags in frozen.items()}
    for flags in found.values():
        assert all(p.help.endswith((".", "…")) for p in flags)


def test_every_setting_has_one_default_and_a_flag_that_shows_it() -> None:
    """Experts' flags stand in a panel of their own, the last one."""
    verbs = parameters(product)
    flags = {p.name: p for p in verbs["generate"]}
    every = flags | {p.name: p for p in verbs["serve"]}
    for name, field in ALL.items():
        panel = every[name].rich_help_panel
        assert (panel == EXPERTS) == field.metadata["expert"]
        if isinstance(field.default, int | float | str):
            shown = every[name].default
            assert (int(shown) if name == "rows" else shown) == field.default
    assert set(settings_of(Placement)) & set(settings_of(Decoding)) == set()
    panels = [p.rich_help_panel for p in flags.values() if p.rich_help_panel]
    assert list(dict.fromkeys(panels)) == ["Placement", "Decoding", "Sampling", EXPERTS]
    records = (EngineConfig, ServerConfig)
    shown = {f.name for record in records for f in dataclasses.fields(record)} - {"trace"}
    assert shown | {f.name for f in dataclasses.fields(SamplingParams)} - {"n"} == set(ALL)


@pytest.fixture
def asked(monkeypatch):
    """Run ``ppsd generate`` up to the model: return its settings, and how it samples."""
    seen: list[Any] = []

    def open_llm(config: EngineConfig, **more: object) -> None:
        frame = inspect.currentframe()
        assert frame is not None
        assert frame.f_back is not None
        seen.append((config, frame.f_back.f_locals["sampling"]))
        raise PpsdError("enough")

    monkeypatch.setattr("ppsd.cli.generate.open_llm", open_llm)

    def settings(*flags: object) -> tuple[EngineConfig, Sampling]:
        error = run("generate", "hi", *flags).exception
        if str(error) != "enough":
            assert error is not None
            raise error
        return seen.pop()

    return settings


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "ppsd.toml"
        path.write_text(text)
        return path

    return write


def test_a_flag_beats_the_environment_that_the_file_that_the_default(
    asked, file, monkeypatch
) -> None:
    text = "stages = 5\nin_flight = 2\ntop_k = 3\nmax_tokens = 9\n"
    flags = ["--config", file(text), "--stages", 2]
    assert asked()[0] == EngineConfig()
    config, sampling = asked(*flags[:2])
    assert (config.stages, config.in_flight) == (5, 2)
    assert sampling.given == {"top_k": 3, "max_tokens": 9}
    monkeypatch.setenv("PPSD_STAGES", "4")
    monkeypatch.setenv("PPSD_TOP_K", "7")
    config, sampling = asked(*flags[:2])
    assert (config.stages, config.in_flight) == (4, 2)
    assert sampling.given == {"top_k": 7, "max_tokens": 9}
    assert asked(*flags)[0].stages == 2
    assert sampling.params({"top_k": 1, "top_p": 0.5}) == SamplingParams(
        top_k=7, top_p=0.5, max_tokens=9
    )
    monkeypatch.setenv("PPSD_CONFIG", str(flags[1]))
    assert asked()[0].in_flight == 2


GIVEN = {  # setting: as a flag, as a variable, in a file, in Python
    "split": ("--split 2,4", "2,4", "[2, 4]", (2, 4)),
    "devices": ("--devices cpu", "cpu", '["cpu"]', ("cpu",)),
    "pace": ("--pace 0.5", "0.5", "0.5", (0.5,)),
    "gate": ("--no-gate", "off", "false", False),
    "escape_special": ("--escape-special", "1", "true", True),
    "timeout": ("--timeout 5", "5", "5", 5),
    "logit_bias": ("--logit-bias 3:-1.5", "3:-1.5", "{ 3 = -1.5 }", {3: -1.5}),
    "stop": ("--stop a --stop b", "a b", '["a", "b"]', ("a", "b")),
    "stop_token_ids": ("--stop-token-ids 5,6", "5,6", "[5, 6]", (5, 6)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_every_kind_of_value_can_be_given_in_three_places(name, asked, file, monkeypatch) -> None:
    flags, variable, written, value = GIVEN[name]

    def found(*flags: object) -> object:
        config, sampling = asked(*flags)
        record = config if name in settings_of(EngineConfig) else sampling.params()
        return getattr(record, name)

    assert found(*flags.split()) == value
    assert found("--config", file(f"{name} = {written}\n")) == value
    monkeypatch.setenv(f"PPSD_{name.upper()}", variable)
    assert found() == (("a b",) if name == "stop" else value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stagse = 3", r"ppsd.toml: unknown setting 'stagse'; did you mean stages\?$"),
        ("in-flight = 3", r"unknown setting 'in-flight'; did you mean in_flight\?$"),
        ("trace = true", "unknown setting 'trace'"),
        ("stages = ", "ppsd.toml is not a TOML file: "),
        ("stages = 'two'", r"^stages must be an integer in \[1, 64\], got 'two'\n"),
        ("stages = 2.0", r"^stages must be an integer in \[1, 64\], got 2.0\n"),
        ("model = 3", r"^model must be a text or a path, got 3\n"),
        ("gate = 1", r"^gate must be True or False, got 1\n"),
        ("logit_bias = { x = 1 }", "^logit_bias must be a table of token ids and numbers"),
        ("[stop]\na = 1", "^stop must be a value or a list, no table"),
    ],
)
def test_a_file_is_refused_in_one_sentence(text, message, asked, file) -> None:
    with pytest.raises(PpsdError, match=message):
        asked("--config", file(text))


def test_a_file_may_begin_with_a_mark(asked, file) -> None:
    assert asked("--config", file("\ufeffstages = 5\n"))[0].stages == 5


def test_a_refused_setting_says_who_set_it(asked, file, monkeypatch) -> None:
    path = file("stages = 99\ntop_k = -1\n")
    for flags, variables, note in [
        (["--config", path], {}, f"stages is set by {path}"),
        (["--config", path, "--stages", 2], {}, f"top_k is set by {path}"),
        ([], {"PPSD_STAGES": "99"}, "stages is set by PPSD_STAGES"),
        ([], {"PPSD_TEMPERATURE": "hot"}, "temperature is set by PPSD_TEMPERATURE"),
    ]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(ConfigError) as caught:
                asked(*flags)
            assert caught.value.__notes__ == [note]
    with pytest.raises(ConfigError) as caught:
        asked("--stages", 99)
    assert not hasattr(caught.value, "__notes__")


def test_stages_that_contradict_the_split_are_refused_and_a_default_follows_it(
    asked, monkeypatch
) -> None:
    for given in (2, 4):
        with pytest.raises(ConfigError, match=r"^stages must be 3 with split \(2, 4\), got"):
            asked("--stages", given, "--split", "2,4")
    assert asked("--stages", 3, "--split", "2,4")[0].stages == 3
    assert asked("--split", "2,4")[0].stages == 3
    monkeypatch.setenv("PPSD_STAGES", "2")
    with pytest.raises(ConfigError) as caught:
        asked("--split", "2,4")
    assert caught.value.__notes__ == ["stages is set by PPSD_STAGES"]


@pytest.mark.parametrize(
    ("variable", "value", "flags"),
    [
        ("PPSD_SPLIT", "2,4", "--stages 2"),
        ("PPSD_SPLIT", "2,4", "--exit-layer 3"),
        ("PPSD_EXIT_LAYER", "3", "--stages 1"),
        ("PPSD_BLOCK", "5", "--mode autoregressive"),
        ("PPSD_TIMEOUT", "5", "--pace 9"),
    ],
)
def test_a_refusal_says_who_set_what_it_is_refused_for(
    variable, value, flags, asked, file, monkeypatch
) -> None:
    name = variable.removeprefix("PPSD_").lower()
    path = file(f"{name} = {[2, 4] if name == 'split' else value}\n")
    with pytest.raises(ConfigError) as caught:
        asked("--config", path, *flags.split())
    assert caught.value.__notes__ == [f"{name} is set by {path}"]
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        asked(*flags.split())
    assert caught.value.__notes__ == [f"{name} is set by {variable}"]


def test_a_key_that_is_given_twice_is_refused(asked) -> None:
    with pytest.raises(ConfigError, match=r"^logit_bias must be id:bias pairs with each id once"):
        asked("--logit-bias", "3:1,3:2")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("STAGSE", "STAGES"), ("MODLE", "MODEL"), ("MOED", "MODE"), ("HEAD_DIRS", "HEAD_DIR")],
)
@pytest.mark.parametrize(
    "words",
    [
        "generate hi",
        "plan",
        "acceptance --head h --data d --out o",
        "distill --exit-layer 1 --data d --out o",
        "profile",
        "heads list",
        "heads show h",
    ],
)
def test_a_variable_that_is_none_is_refused(words, wrong, right, monkeypatch) -> None:
    monkeypatch.setenv(f"PPSD_{wrong}", "3")
    error = run(*words.split()).exception
    assert str(error) == f"unknown variable PPSD_{wrong}; did you mean PPSD_{right}?"


def test_what_all_variables_begin_with_makes_no_name_near(monkeypatch) -> None:
    monkeypatch.setenv("PPSD_FOO", "3")
    assert str(run("heads", "list").exception) == "unknown variable PPSD_FOO"


def test_variables_that_kubernetes_sets_beside_a_service_of_this_name_are_no_settings(
    monkeypatch,
) -> None:
    for name, text in {
        "PPSD_SERVICE_HOST": "10.0.0.1",
        "PPSD_SERVICE_PORT_HTTP": "8000",
        "PPSD_PORT": "tcp://10.0.0.1:8000",
        "PPSD_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PPSD_PORT_8000_TCP_ADDR": "10.0.0.1",
        "PPSD_METRICS_SERVICE_HOST": "10.0.0.2",
        "PPSD_METRICS_PORT": "tcp://10.0.0.2:9090",
        "PPSD_MAX_QUEUE": "7",
    }.items():
        monkeypatch.setenv(name, text)
    lines = run("serve", "--print-config").stdout.splitlines()
    assert "port = 8000" in lines
    assert "max_queue = 7  # PPSD_MAX_QUEUE" in lines
    monkeypatch.setenv("PPSD_SERVICE", "1")
    with pytest.raises(PpsdError, match="unknown variable PPSD_SERVICE"):
        check_environment()


def test_a_file_that_is_not_there_is_named(asked) -> None:
    with pytest.raises(PpsdError, match="cannot read settings from /no/such: No such file"):
        asked("--config", "/no/such")


def test_the_laboratory_leaves_out_what_its_verbs_set(monkeypatch) -> None:
    """Flags that a verb would refuse or ignore are not there; a variable for others is no error."""
    monkeypatch.setenv("PPSD_MODE", "autoregressive")
    command = laboratory.load("efficiency")
    assert not {"mode", "head", "block", "gate"} & {p.name for p in command.params}


@pytest.mark.parametrize(
    ("words", "found"),
    [("ppsd ver", "verify"), ("ppsd generate --in", "--in-flight --init-timeout"),
     ("ppsd-lab e", "efficiency endurance")],
)  # fmt: skip
def test_shells_complete_verbs_and_flags(words, found, monkeypatch, capsys) -> None:
    command, *_ = words.split()
    monkeypatch.setattr("sys.argv", [command])
    variable = f"_{command.upper().replace('-', '_')}_COMPLETE"
    monkeypatch.setenv(variable, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert COMMANDS[command][0].main() == 0
    assert sorted(capsys.readouterr().out.split()) == sorted(found.split())


def test_the_guide_names_every_verb_of_the_product_and_how_settings_are_given() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert {v for v in product.COMMAND.verbs if not re.search(rf"ppsd {v}\b", guide)} == set()
    assert all(word in guide for word in ("PPSD_STAGES", "--config", "--install-completion"))
