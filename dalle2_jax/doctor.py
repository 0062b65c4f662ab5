"""`python -m dalle2_jax.doctor` is `dalle2 doctor`."""

if __name__ == "__main__":
    from dalle2_jax.commands import main

    main("doctor")
