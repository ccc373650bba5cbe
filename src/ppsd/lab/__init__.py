"""The laboratory: benchmarks, the simulator and studies. The product never imports it."""
