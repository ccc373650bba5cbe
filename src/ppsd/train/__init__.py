"""Self-distillation of exit heads: the model stays frozen and teaches small heads to guess it."""
