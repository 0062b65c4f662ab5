"""The limits of what a caller may ask for, in Python and on the command line."""

MOST_PICTURES = 100_000  # in one call
MOST_GUIDANCE = 1000.0
MOST_REPEATS = 1000  # of a step of RePaint
MOST_EXTEND = 7  # of outpaint's canvas
LARGEST_SEED = 2**32 - 1
