"""What scenario files are made of: strict tables, sizes, objectives, questions, TOML."""
