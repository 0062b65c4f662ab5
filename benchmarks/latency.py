"""How long a picture takes: the first one, and each after a change of a setting.

    python benchmarks/latency.py [--repeats=3] [--beside=CHECKOUT]

Each run is a process of its own that makes 4 pictures of a prompt with the bundled
model, then again, with another guidance, with other steps and with other numbers of
pictures. "cold" has no compilation cache, "warm" has that of the run before. With
--beside, runs of another checkout of this package alternate with those of this one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, sys, time
start = float(sys.argv[1])
import dalle2_jax

times = {"import": time.time() - start}
try:  # as sample.py of earlier versions does; now load() does it
    from dalle2_jax.train.cache import use_compilation_cache
    use_compilation_cache()
except ImportError:
    pass
model = dalle2_jax.load()
times["load"] = time.time() - start

def draw(name, **settings):
    begin = time.time()
    given = {"num": 4, "guidance": {"decoder": 2.0}} | settings
    dalle2_jax.text_to_image(model, "a large red circle", **given)
    times[name] = time.time() - begin

draw("first call")
times["first picture"] = time.time() - start
draw("second call", seed=1)
draw("other guidance", guidance={"decoder": 3.0})
draw("other steps", steps={"prior": 20, "decoder": 20})
draw("3 pictures", num=3)
draw("9 pictures", num=9)
draw("9 pictures again", num=9, seed=1)
print(json.dumps(times))
"""


def run(checkout: Path, cache: str) -> dict[str, float]:
    """The seconds of one process."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XDG_CACHE_HOME": cache,
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(time.time())],
        cwd=cache,
        env=environment,
        check=True,
        text=True,
        capture_output=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beside", type=Path)
    arguments = parser.parse_args()
    checkouts = {"this": Path(__file__).parents[1]}
    if arguments.beside:
        checkouts["beside"] = arguments.beside.resolve()
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for _ in range(arguments.repeats):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    times = found.setdefault((name, state), {})
                    for what, seconds in run(checkout, cache).items():
                        times.setdefault(what, []).append(seconds)
    columns = list(found)
    rows = list(found[columns[0]])
    print(
        "| seconds | "
        + " | ".join(f"{name}, {state}" for name, state in columns)
        + " |"
    )
    print("|---|" + "---|" * len(columns))
    for row in rows:
        cells = (statistics.median(found[column][row]) for column in columns)
        print(f"| {row} | " + " | ".join(f"{x:.2f}" for x in cells) + " |")


if __name__ == "__main__":
    main()
