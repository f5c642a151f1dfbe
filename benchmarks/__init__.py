"""Measurements: `python -m benchmarks.<name>`. Each writes a JSON of flat keys into `benchmarks/results/`."""

import sdxl as _quiet  # noqa: F401 - before diffusers: it quiets what diffusers would log about kernels
