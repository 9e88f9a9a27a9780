"""A command line from its first import to its exit, and what it prints."""
