"""`python -m dalle2_jax.plan` is `dalle2 plan`."""

if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("plan")
