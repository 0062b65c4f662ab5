"""How a stage is trained: the loop, the optimiser, the mesh and the log."""
