"""What one 80 GB H100 of a DGX does a second, and the share of it that a plan counts on.

Estimates, beside which one H200 showed (``make gpu-check``, examples/README.md): passes of a 1.5B student at 0.41 of
the peak, an FP8 gain of 1.3 to 1.5, 0.07 s to wake an engine's weights and fill them.
"""

# NVIDIA's datasheet: dense bf16 operations, bytes of its own memory, bytes each way inside a node and out of it.
PEAK_FLOPS, PEAK_BYTES, PEAK_LINK, PEAK_NETWORK = 989e12, 3.35e12, 450e9, 50e9
# Estimated shares: long matrix products with all that lies between them, reading memory, collectives.
FLOPS, BYTES, LINK, NETWORK = 0.45 * PEAK_FLOPS, 0.6 * PEAK_BYTES, 0.7 * PEAK_LINK, 0.7 * PEAK_NETWORK
FP8_GAIN = 1.5  # of the layers' products in FP8 over bf16
HOST_LINK = 25e9  # bytes between a GPU and pinned host memory
HOST_COPY = 6e9  # bytes between a GPU and host memory that is not pinned
DISK = 1e9  # bytes that a node writes to a shared file system
STEP_S = 5e-3  # of an engine besides its products: scheduling, launches, sampling
ALL_REDUCE_S = 15e-6  # of a small all-reduce inside a node: what a generated token waits for, twice a layer
WAKE_S = 0.2  # an engine falls asleep and wakes: its memory is unmapped and mapped
TENSOR_S = 1e-4  # to hand an engine one tensor
CPU_FLOPS = 3e10  # products in bf16 or fp32 of about one core
# What a plan assumes of responses, as a share of the greatest length: their length on average, which is the worst case,
# and a shorter one for which its advice must hold, too.
LENGTH, SHORTER = 1.0, 0.5
