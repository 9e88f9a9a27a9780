"""Everything that a GPU is needed for, in one command within a given time."""
