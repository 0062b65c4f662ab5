"""What captions are like, as a tokenizer reads them."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dalle2_jax.checks.finding import Finding, ok
from dalle2_jax.data.tokenizer import Tokenizer

LONGEST = 1024  # tokens of a caption that are counted
MANY = 0.05  # of the sample: worth a warning
SPELT = 0.5  # tokens a character above which a caption is read letter by letter


def judge(
    captions: Sequence[str],
    lengths: Int[np.ndarray, " n"],
    context_length: int,
    several: bool = False,
) -> list[Finding]:
    """How long captions are, how well the tokenizer knows them, how often they recur.

    Args:
      captions: all of the sample.
      lengths: their tokens, start and end included, uncut; see `count_tokens`.
      context_length: tokens that are read.
      several: whether they were written to recur, as those of drawn pictures.
    """
    cut = int((lengths > context_length).sum())
    empty = int((lengths <= 2).sum())
    characters = np.array([max(len(caption), 1) for caption in captions])
    spelt = (lengths - 2 > SPELT * characters) & (lengths > 2)
    found = (
        f"{len(captions)} captions of {np.median(lengths):g} tokens (median) to "
        f"{lengths.max()}, of {context_length} read; {cut} are cut, {empty} are empty"
    )
    findings = [ok("captions", found)]
    if cut > MANY * len(captions):
        longest = captions[int(lengths.argmax())]
        remedy = (
            f"what comes late in them is not seen, as of {_short(longest)}; shorten "
            "them, or train a CLIP of a longer net.context_length"
        )
        findings = [Finding("warning", "captions", found, remedy)]
    elif empty:
        remedy = "filter with --min_words=1"
        findings = [Finding("warning", "captions", found, remedy)]
    found = f"{spelt.sum()} of {len(captions)} captions are read letter by letter"
    if spelt.sum() > MANY * len(captions):
        found += f", as {_short(captions[int(spelt.argmax())])}"
        remedy = "the tokenizer doesn't know their words; train CLIP on these captions"
        findings.append(Finding("warning", "words", found, remedy))
    else:
        findings.append(ok("words", found))
    repeated = len(captions) - len(set(captions))
    found = f"{repeated} of {len(captions)} captions repeat another"
    if repeated > len(captions) / 2 and not several:
        most, times = Counter(captions).most_common(1)[0]
        found += f", {_short(most)} {times} times"
        remedy = "captions that say more of each picture teach more"
        findings.append(Finding("warning", "repeats", found, remedy))
    else:
        findings.append(ok("repeats", found))
    return findings


def count_tokens(text: Tokenizer, captions: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Of each caption, start and end included; at most `LONGEST`."""
    return text.lengths(text.encode(captions, LONGEST, warn=False))


def _short(caption: str) -> str:
    return repr(caption if len(caption) <= 40 else caption[:37] + "...")
