"""The cache: nothing that another user can have written is read from it, and it does not grow."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ppsd import LLM, SamplingParams
from ppsd.errors import ConfigError, ModelError
from ppsd.model import head_library
from ppsd.model.sidecar import KEPT_DAYS, cache_root, cached, own_bytes
from ppsd.model.source import resolve_model
from ppsd.plan.profile import load_profile, profile_path

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PPSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_text("model")
    return file


def ask(source: Path, kind: str = "spec", value: bytes = b"ours") -> tuple[bytes, bool]:
    """Return a cached value, and whether it had to be built."""
    built = []

    def read(files: Mapping[str, bytes]) -> bytes:
        return files["value"]

    def build() -> bytes:
        built.append(kind)
        return value

    found = cached(source, kind, build, lambda v, place: (place / "value").write_bytes(v), read)
    return found, bool(built)


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def plant(root: Path, damage: str) -> None:
    (entry,) = entries(root)
    value = entry / "value"
    elsewhere = root.parent / "elsewhere"
    if damage == "file is a link":
        value.rename(elsewhere)
        value.symlink_to(elsewhere)
    elif damage == "entry is a link":
        entry.rename(elsewhere)
        entry.symlink_to(elsewhere)
    elif damage == "file is a pipe":
        value.unlink()
        os.mkfifo(value)
    elif damage == "file anybody's":
        value.chmod(0o666)
    elif damage == "entry anybody's":
        entry.chmod(0o777)
    elif damage == "content":
        value.write_bytes(b"theirs")
    else:
        place = {"file given away": value, "entry given away": entry, "root given away": root}
        os.chown(place[damage], STRANGER, STRANGER)


DAMAGES = [
    *("file is a link", "entry is a link", "file is a pipe", "file anybody's", "entry anybody's"),
    "content",
    *(pytest.param(f"{what} given away", marks=as_root) for what in ("file", "entry", "root")),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["spec", "tokenizer", "kernels-0123"])
def test_what_others_can_have_written_is_built_anew(root, source, kind, damage) -> None:
    assert ask(source, kind) == (b"ours", True)
    assert ask(source, kind) == (b"ours", False)
    plant(root, damage)
    assert ask(source, kind) == (b"ours", True)
    repaired = damage != "root given away"  # nothing is written there either
    assert ask(source, kind) == (b"ours", not repaired)


def test_one_entry_cannot_stand_for_another(root, source) -> None:
    ask(source, "spec", b"one")
    ask(source, "tokenizer", b"two")
    spec, tokenizer = entries(root)
    spec.rename(root / "spare")
    tokenizer.rename(spec)
    assert ask(source, "spec", b"one") == (b"one", True)


def test_entries_are_ours_alone_whatever_the_umask(root, source) -> None:
    before = os.umask(0o002)  # as where every user has a group
    try:
        ask(source)
    finally:
        os.umask(before)
    assert ask(source) == (b"ours", False)
    places = (root, *root.rglob("*"))
    assert [path for path in places if path.stat().st_mode & 0o022] == []


def test_old_entries_are_removed(root, source) -> None:
    ask(source, "tokenizer")
    ask(source, "spec")
    source.write_text("another model")
    ask(source, "spec", b"new")
    assert len(entries(root)) == 2, "the spec of the former file has gone"
    for name in ("0" * 64 + "-spec", "draft-abandoned"):  # of format 1, and of a killed process
        (root / name).mkdir()
    (root / "heads").mkdir()
    for path in (*root.iterdir(), root / "heads"):
        past = time.time() - (KEPT_DAYS + 1) * 86400
        os.utime(path, (past, past))
    assert ask(source, "spec", b"new") == (b"new", False)  # used, so young again
    ask(source, "other")
    kinds = [path.name.rpartition("-")[2] for path in entries(root)]
    assert sorted(kinds) == ["heads", "other", "spec"]


@pytest.mark.parametrize("damage", ["link", "anybody's", pytest.param("given", marks=as_root)])
def test_a_file_of_others_is_no_profile(root, damage, tmp_path) -> None:
    place = profile_path("0" * 16, "bfloat16", 1)
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    place.chmod(0o600)
    assert own_bytes(place) == b"{}"
    if damage == "link":
        place.rename(tmp_path / "theirs")
        place.symlink_to(tmp_path / "theirs")
    elif damage == "given":
        os.chown(place, STRANGER, STRANGER)
    else:
        place.chmod(0o666)
    with pytest.raises(ConfigError, match=r"symbolic links|another user's, or theirs to write"):
        load_profile(place, own=True)
    with pytest.raises(ConfigError, match="KeyError"):
        load_profile(place)  # named by the user, so trusted


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that nobody has."""
    for name in ("PPSD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr("pwd.getpwuid", nobody)


def test_an_empty_home_is_none(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(FileNotFoundError, match="no home directory for a cache; set PPSD_CACHE"):
        cache_root()


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_has_no_cache(source, tiny_model) -> None:
    with pytest.raises(FileNotFoundError, match="set PPSD_CACHE"):
        cache_root()
    assert ask(source) == (b"ours", True)
    assert ask(source) == (b"ours", True)
    shipped = [head for head in head_library.find_heads() if head.shipped]
    assert head_library.find_heads() == shipped
    with pytest.raises(ModelError, match="'~/model' does not exist"):
        resolve_model("~/model")
    with LLM(str(tiny_model()), stages=2, transport="inprocess", dtype="float64") as llm:
        assert llm.run([5, 6], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids


@as_root
def test_a_strangers_head_in_the_cache_is_not_used(root) -> None:
    (shipped, *_) = head_library.find_heads()
    place = root / "heads" / "mine"
    place.mkdir(parents=True)
    for file in shipped.path.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    assert head_library.find_heads()[-1].config == shipped.config
    os.chown(place / "head.safetensors", STRANGER, STRANGER)
    found = head_library.find_heads()[-1]
    assert (found.path, found.config) == (place, None)
    assert "another user's" in found.problem
