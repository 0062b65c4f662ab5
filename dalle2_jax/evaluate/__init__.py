"""Measures models by what they make."""
