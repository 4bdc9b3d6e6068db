"""The commands over ``nemo_tropd``."""
