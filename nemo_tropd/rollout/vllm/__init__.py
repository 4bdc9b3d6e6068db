"""vLLM as the rollout engine: in the trainer's process, in a process of its own, or on hosts of its own."""
