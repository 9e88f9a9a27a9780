"""Requests: when they arrive, how long they are, and the traces they may come from."""
