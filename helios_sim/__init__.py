"""helios-sim: simulate, calibrate and plan early-exit language model serving with HELIOS."""
