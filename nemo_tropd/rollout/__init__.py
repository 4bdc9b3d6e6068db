"""Rollouts: what is asked of an engine, vLLM as that engine, its weights, and prefixes written by the teacher."""
