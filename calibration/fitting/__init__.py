"""Readings become a profile with its errors, a check of it, and its page."""
