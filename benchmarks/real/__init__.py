"""Checks of what this project assumes about SDXL 1.0 and its helper models. `python -m benchmarks.check_real` runs them.

A check is a function with a name, a question, and expectations that it notes. Knows the product; the product never imports
it.
"""
