"""Process groups, devices, and what megatron-core needs where there is no CUDA."""
