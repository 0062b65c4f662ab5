"""`python -m dalle2_jax.filter` is `dalle2 filter`."""

if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("filter")
