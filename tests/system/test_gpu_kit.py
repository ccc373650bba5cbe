"""The kit for a GPU, in small and on a CPU: every part runs and leaves its result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ppsd.plan.profile import load_profile

ROOT = Path(__file__).parents[2]
KIT = str(ROOT / "tools" / "gpu" / "kit.sh")
Models = Callable[[str], Path]


def run(place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"KEPT": str(place / "kept"), "WORK": str(place / "work")}
    return subprocess.run(
        [KIT, *map(str, words)], capture_output=True, text=True, timeout=600, env=environment
    )


def test_heads_are_trained_on_what_the_model_wrote(tiny_model: Models, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"pack my box with {i} dozen jugs"} for i in range(40)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--device", "cpu", "--tiny", "--minutes", 0.2, "--out", tmp_path / "out")
    done = run(tmp_path, *words, "--model", tiny_model("llama"), "--prompts", prompts, "heads")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert found["exit_codes"] == [0, 0]
    assert all(w["answers"] > 0 for w in found["written"])
    assert found["one-layer"]["validations"][-1]["final"].keys() == {"1", "2"}
    with tarfile.open(tmp_path / "out" / "heads.tar.0") as tar:
        names = tar.getnames()
    assert "two-layers/transformer-2/head.safetensors" in names
    assert sum(name.endswith("prompts.txt") for name in names) == 1


def test_exactness_is_checked(tiny_model: Models, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--tiny", "--out", tmp_path, "--model", tiny_model("llama"))
    done = run(tmp_path, *words, "exactness")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "exactness.json").read_text())
    assert {row["kernel"] for row in found["rows"]} >= {"norm", "attention over 256"}
    assert all(row["equal"] == row["tokens"] for row in found["reference"])
    assert [row["rows"] for row in found["decoding"]] == [1, 16]
    assert all(row["bitwise"] == row["prompts"] for row in found["decoding"])


def test_the_steps_become_a_profile(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", "--tiny", "--out", tmp_path, "step")
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "profile.json")
    assert profile.layer_time(128) > 0
    assert json.loads((tmp_path / "step.json").read_text())["hop"]["one_way"]["median"] > 0


def test_parts_travel_and_a_damaged_one_is_noticed(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools" / "gpu"))
    try:
        import travel
    finally:
        sys.path.pop(0)
    archive = tmp_path / "all.tar.gz"
    (tmp_path / "weights.gguf").write_bytes(os.urandom(3000))
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "weights.gguf", "weights.gguf")
    parts = travel.split(archive, tmp_path / "parts", 1000)
    for number in range(parts):
        travel.receive(tmp_path / "parts", tmp_path / "kept", number)
    kept = (tmp_path / "kept" / "weights.gguf").read_bytes()
    assert kept == (tmp_path / "weights.gguf").read_bytes()
    (tmp_path / "parts" / "part-0" / "data").write_bytes(b"other")
    with pytest.raises(SystemExit, match="send them again"):
        travel.receive(tmp_path / "parts", tmp_path / "kept", 0)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "everything")
    assert done.returncode == 2
    assert "unknown word everything; parts are heads, exactness and step" in done.stderr
