"""Hugging Face checkpoints to Megatron and back: the one place that knows names and layouts."""
