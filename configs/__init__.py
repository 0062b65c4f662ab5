"""Configs: one file for each stage, one row of its table for each size."""
