"""Rank 0: events to the policy, commands to the pipeline, text in and out."""
