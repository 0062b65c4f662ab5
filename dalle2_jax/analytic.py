"""`python -m dalle2_jax.analytic` is `dalle2 analytic`."""

if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("analytic")
