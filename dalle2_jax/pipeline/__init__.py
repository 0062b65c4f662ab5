"""What is sampled: a loaded model, and pictures made with it."""
