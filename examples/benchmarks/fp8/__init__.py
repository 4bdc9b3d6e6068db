"""FP8 emulated on a CPU, and what it does to a real teacher."""
