"""Real early-exit language models on transformers: partly loaded, with exits and a KV pool."""
