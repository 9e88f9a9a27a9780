"""Searches over scenarios: `plan` (capacity and fleets), `tune` (settings), `whatif` (grids)."""
