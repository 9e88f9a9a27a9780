"""helios-sim: simulate, calibrate and plan early-exit language model serving with HELIOS."""

__version__ = "0.1.0"
