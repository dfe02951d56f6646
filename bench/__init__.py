"""Benchmarks: `python bench/run.py`. See bench/README.md."""
