"""Whether a config is worth a long run: what is wrong with it, its data, its speed."""
