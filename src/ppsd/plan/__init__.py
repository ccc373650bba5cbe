"""What decoding costs: theory, cost model, profile, planner. Plain floats, no torch."""
