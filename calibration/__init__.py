"""The calibration job: measures early-exit models on real hardware into profiles."""
