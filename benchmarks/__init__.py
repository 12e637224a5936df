"""Timings beside other libraries: `python -m benchmarks speed`."""
