"""The policy, acceptance and sampling: pure functions and state machines."""
