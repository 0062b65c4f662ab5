"""Gaussian diffusion: the noise schedule, the process and its losses, and samplers.

Nothing here knows a network. `schedule` holds the tables, `process` the formulas that
training and sampling share, `sample` the loops that turn noise into data, and `guide`
the wrappers that make a denoiser out of a network and steer it.
"""
