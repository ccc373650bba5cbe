"""What decoding costs: theory, cost model, simulator, reports. Plain floats, no torch."""
