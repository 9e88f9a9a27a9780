"""The whole circle on a GPU that is made up: measure, fit, serve, simulate, compare."""
