"""The ``ppsd`` command and its verbs."""

from __future__ import annotations

from ppsd.cli.verbs import Command

TITLE = "exact, low-latency LLM decoding over several devices (arXiv 2509.19368)"
BEGIN = f"""ppsd: {TITLE}

To begin:
  ppsd generate "Why is the sky blue?"   answer a prompt
  ppsd chat                              talk with the model
  ppsd models                            list the models that can be used here
  ppsd profile                           time this machine, for better plans

`ppsd --help` lists all verbs, `ppsd VERB --help` explains one.
"""
VERBS = {
    "Use a model": {
        "generate": "Complete a prompt and stream the answer.",
        "chat": "Talk with the model; the conversation and its cache are kept.",
        "serve": "Answer OpenAI's clients over HTTP.",
    },
    "Look around": {
        "models": "List the models that can be used here.",
        "heads": "List and inspect exit heads.",
        "env": "Print what is in force here, for a bug report.",
    },
    "Make it faster": {
        "profile": "Time this machine once; later plans use the result.",
        "plan": "Find split, exit, mode and window; predict what they bring.",
        "distill": "Train exit heads by self-distillation, or continue a run.",
    },
    "Check": {
        "verify": "Check that a mode says exactly what plain decoding says.",
        "acceptance": "Measure how often the drafts of exit heads are accepted.",
    },
}
COMMAND = Command("ppsd", TITLE, BEGIN, VERBS, "ppsd.cli")
load, app = COMMAND.load, COMMAND.app()


def main() -> int:
    """Run ``ppsd``; return its exit code."""
    return COMMAND.run(app)
