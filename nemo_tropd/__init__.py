"""Trust-Region On-Policy Distillation (TrOPD, arXiv 2606.01249) at Megatron scale."""

__version__ = "0.1.0"
