"""Evaluation: benchmarks and data sets of one's own, counted over processes, with oracles and reports."""
