"""What a run leaves: its records on disk, the laws they keep, and the figures they come to."""
