"""Megatron's GPTModel for a Hugging Face architecture, with a head that gives hidden states."""
