"""Measurements: `python -m benchmarks.<name>`. Each writes a JSON of flat keys into `benchmarks/results/`."""
