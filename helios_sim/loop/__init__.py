"""The compiled serving loop: state, queues, rows, blocks, and what carries a replica on."""
