"""Which sampler, steps and guidance interval show a caption for the fewest seconds.

    python benchmarks/samplers.py --num=500 [--only="NAME;NAME"]

For each way of sampling from the bundled model: how often all of a caption is right, by
the checker of dalle2_jax.evaluate on `num` captions of each kind, and the time of a
batch of 16 pictures beside that of the first way, which it alternates with.
"""

import argparse
import statistics
import time
from typing import Any

import dalle2_jax
from dalle2_jax.evaluate import shapes

PROMPTS = ["a large red circle above a small blue square"] * 16


def ways() -> dict[str, dict[str, Any]]:
    """The settings of `text_to_image` by name; the first are those of training."""

    def steps(prior: int, decoder: int, upsampler: int) -> dict[str, Any]:
        return {"prior": prior, "decoder": decoder, "upsampler": upsampler}

    found = {"ddpm 25": {"sampler": "ddpm", "steps": steps(25, 25, 8)}}
    for sampler in ("ddim", "dpm_solver", "unipc"):
        found[f"{sampler} 10"] = {"sampler": sampler, "steps": steps(10, 10, 4)}
    found["unipc 8"] = {"sampler": "unipc", "steps": steps(8, 8, 4)}
    found["unipc 8, 3"] = {"sampler": "unipc", "steps": steps(8, 8, 3)}
    for low, high in ((200, 900), (300, 800), (0, 800), (300, 999)):
        interval = {"guidance_interval": {"decoder": (low, high)}}
        found[f"unipc 8, 3, {low} to {high}"] = found["unipc 8, 3"] | interval
    found["unipc 6, 3"] = {"sampler": "unipc", "steps": steps(8, 6, 3)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num", type=int, default=500, help="captions of each kind")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--only", default="", help="names of ways, with semicolons")
    arguments = parser.parse_args()
    model, chosen = dalle2_jax.load(), ways()
    first = next(iter(chosen))
    if arguments.only:
        wanted = [name.strip() for name in arguments.only.split(";")]
        chosen = {name: chosen[name] for name in wanted}

    def seconds(settings: dict[str, Any]) -> float:
        start = time.perf_counter()
        dalle2_jax.text_to_image(model, PROMPTS, **settings)
        return time.perf_counter() - start

    print("| way | " + " | ".join(shapes.KINDS) + " | time |", flush=True)
    print("|---|" + "---|" * (len(shapes.KINDS) + 1), flush=True)
    for name, settings in chosen.items():

        def sample(prompts: list[str], seed: int, settings: Any = settings) -> Any:
            return dalle2_jax.text_to_image(model, prompts, seed=seed, **settings)

        verdicts = shapes.evaluate(sample, arguments.num, arguments.seed)
        table = shapes.accuracy(verdicts)
        cells = [
            f"{100 * r.rate:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})"
            for r in (table[kind]["all"] for kind in shapes.KINDS)
        ]
        seconds(ways()[first])
        ratios = [seconds(settings) / seconds(ways()[first]) for _ in range(5)]
        time_of = statistics.median(ratios)
        print(f"| {name} | {' | '.join(cells)} | {time_of:.2f} |", flush=True)


if __name__ == "__main__":
    main()
