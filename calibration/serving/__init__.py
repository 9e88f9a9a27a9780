"""Serving a scenario for real: batches on the model, the shared policy, the common run folder."""
