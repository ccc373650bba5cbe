"""Measurements: workloads, verification, and later benchmarks."""
