"""Measuring models and their device: grids, timers, meters and readings that outlive a crash."""
