"""Small early-exit models, exit heads, confidence, and exit traces on held-out text."""
