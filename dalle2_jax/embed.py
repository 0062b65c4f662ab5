"""`python -m dalle2_jax.embed` is `dalle2 embed`."""

import sys

if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("embed")
elif __name__ == "dalle2_jax.embed":
    # An imported module becomes an attribute of its package, and would hide the public
    # function of this name. What is here in sys.modules is imported in its place.
    from dalle2_jax.pipeline.edit import embed

    sys.modules[__name__] = embed
