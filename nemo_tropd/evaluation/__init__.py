"""Benchmarks: problems, a model's answers, verdicts on them, and what the numbers say."""
