"""Process groups, devices, and what megatron-core needs without CUDA."""
