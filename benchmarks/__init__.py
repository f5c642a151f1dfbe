"""Benchmarks: `python -m benchmarks.<name>`. Each writes a JSON file of flat keys into `benchmarks/results/`."""

import sdxl as _quiet  # noqa: F401 - import it before diffusers: it silences diffusers' log lines about kernels
