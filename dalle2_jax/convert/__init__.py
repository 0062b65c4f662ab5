"""The weights of other implementations, both ways."""
