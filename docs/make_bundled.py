"""Puts trained parts together as the bundled model, in half precision.

python docs/make_bundled.py runs/{clip,prior,decoder,upsampler}/model

Of a part that several models have, the last one's is taken.
"""

import sys

import jax
import numpy as np

from dalle2_jax import checkpoint
from dalle2_jax.data import tokenizer

if __name__ == "__main__":
    models = [checkpoint.load(path) for path in sys.argv[1:]]
    parts, params, statistics, text = {}, {}, {}, None
    for model in models:
        parts |= model.config["parts"]
        params |= model.params
        statistics |= model.statistics
        text = model.tokenizer_dir or text
    checkpoint.export(
        checkpoint.BUNDLED,
        params=jax.tree.map(np.float16, params),
        config={"parts": parts},
        tokenizer=tokenizer.load(text),
        statistics=statistics,
    )
    size = sum(p.stat().st_size for p in checkpoint.BUNDLED.rglob("*") if p.is_file())
    print(f"{', '.join(parts)}: {size / 2**20:.1f} MiB in {checkpoint.BUNDLED}")
