"""The tests that a module's mutants meet, by module below src/ppsd, the fastest files first.

Modules with the same tests, one after the other, are searched together.
"""

from __future__ import annotations

CHAINS = "contract/test_planted_bugs.py::test_without_a_bug_every_check_passes"
TREES = "contract/test_planted_wave_bugs.py::test_without_a_bug_every_check_passes"
TEXT = ("unit/test_tokenizer.py", "unit/test_ids.py", "unit/test_text.py", "unit/test_escape.py")
GATED = "contract/test_exact_oracle.py::test_a_hurried_gate_pauses_and_resumes"
RULES = (
    *("unit/test_policy.py", "unit/test_tree.py", "unit/test_waves.py", "unit/test_lookup.py"),
    *("unit/test_wave_engine.py", GATED, CHAINS, TREES),
)
LOOPS = (
    *("unit/test_judge.py", "unit/test_loop.py", "unit/test_inner_head.py"),
    *("unit/test_first_stage.py", "unit/test_engine.py"),
    *("unit/test_wave_engine.py", "unit/test_joined.py", "unit/test_trace.py"),
    *("unit/test_logprobs.py", "serve/test_echo.py", GATED, CHAINS, TREES),
)
TALKS = (
    *("unit/test_llm.py", "unit/test_trace.py", "unit/test_logprobs.py", "unit/test_ids.py"),
    *("serve/test_echo.py", "contract/test_many.py", "contract/test_streams.py"),
)
MEMORY = (
    *("unit/test_slots.py", "unit/test_joined.py", "unit/test_cache_stage.py"),
    # not unit/test_trees.py, nor the rest of this file: their kernels make threads
    *("unit/test_packed.py::test_parts_are_packed_together_or_not_at_all", "unit/test_logprobs.py"),
)
TESTS: dict[str, tuple[str, ...]] = {
    "speculation/accept": ("unit/test_accept.py",),
    "speculation/sampling": ("unit/test_sampling.py",),
    **dict.fromkeys([f"speculation/{n}" for n in ("policy", "tree", "waves")], RULES),
    **dict.fromkeys([f"speculation/{n}" for n in ("copies", "lookup")], RULES),
    **dict.fromkeys(
        [f"worker/{n}" for n in ("judge", "inner_head", "slot", "link", "loop")], LOOPS
    ),
    **dict.fromkeys([f"engine/{n}" for n in ("wave_engine", "engine", "sequence")], LOOPS),
    "engine/layout": ("unit/test_layout.py", "unit/test_logprobs.py"),
    **dict.fromkeys(
        ("engine/text_engine", "engine/stats"),
        ("unit/test_text_engine.py", "unit/test_logprobs.py", "serve/test_echo.py"),
    ),
    "engine/thread": ("unit/test_thread.py",),
    "engine/llm": TALKS,
    "engine/links": ("unit/test_links.py", "unit/test_engine.py", "unit/test_logprobs.py"),
    "engine/first_stage": (
        *("unit/test_first_stage.py", "unit/test_engine.py", "unit/test_logprobs.py"),
        *(GATED, CHAINS, TREES),
    ),
    "engine/drafter": ("unit/test_drafter.py", "unit/test_exit_head.py"),
    "model/draft_vocabulary": ("unit/test_draft_vocabulary.py",),
    **dict.fromkeys([f"model/{n}" for n in ("cache", "stage")], MEMORY),
    **dict.fromkeys(
        [f"worker/{n}" for n in ("messages", "wave_messages", "frame")], ("unit/test_messages.py",)
    ),
    **dict.fromkeys(("model/tokenizer", "model/escape", "engine/text"), TEXT),
    "model/gguf_tokenizer": ("unit/test_gguf_tokenizer.py",),
    "engine/logprobs": ("unit/test_logprobs.py",),
    "engine/rejection": ("unit/test_rejection.py", "contract/test_rejection.py"),
    "worker/recorder": ("unit/test_trace.py",),
    "speculation/gate": ("unit/test_gate_rules.py", "unit/test_gate.py"),
    "model/runners": (*MEMORY, "unit/test_kernels.py"),
}
