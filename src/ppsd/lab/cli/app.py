"""The ``ppsd-lab`` command and its verbs."""

from __future__ import annotations

from ppsd.cli.verbs import Command

TITLE = "benchmarks and studies of ppsd"
BEGIN = f"""ppsd-lab: {TITLE}

To begin:
  ppsd-lab efficiency             compare this machine with theory
  ppsd-lab simulate --stages 8    predict decoding on eight devices

`ppsd-lab --help` lists all verbs, `ppsd-lab VERB --help` explains one.
"""
VERBS = {
    "Measure with drafts of chosen quality": {
        "efficiency": "Compare PPSD's speedup with theory; say where the rest goes.",
        "predict": "Compare the simulator's token times with the engine's.",
        "splits": "Decode with every split; compare the planned with the best.",
        "endurance": "Watch late tokens of long requests, and memory over many.",
    },
    "Measure with trained heads on real prompts": {
        "tasks": "Compare plain decoding, PPSD and its rivals.",
        "load": "Compare PPSD with plain decoding, many requests at once.",
        "baselines": "Compare the pipeline with other decoders on the same cores.",
        "knn-ssd-search": "Find the sub-layers that a rival's drafts leave out.",
    },
    "Calculate": {
        "simulate": "Predict decoding for given times, or for a preset.",
        "paper": "Write a report of the paper's settings.",
    },
    "Show": {
        "report": "Turn result files into one page with plots.",
    },
}
COMMAND = Command("ppsd-lab", TITLE, BEGIN, VERBS, "ppsd.lab.cli")
load, app = COMMAND.load, COMMAND.app()


def main() -> int:
    """Run ``ppsd-lab``; return its exit code."""
    return COMMAND.run(app)
