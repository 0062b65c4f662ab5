"""Captions to tokens, with CLIP's byte-level BPE: the public one, or one trained here.

The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word, the merges
in order, <|startoftext|>, <|endoftext|>. The end token so has the greatest id, by which
CLIP's text tower finds it.
"""

import itertools
import json
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int32

from dalle2_jax.errors import UserError, first_line
from dalle2_jax.files import check_files, read_json

SPECIALS = ("<|startoftext|>", "<|endoftext|>")
SMALLEST = 512 + len(SPECIALS)
# What transformers reads in a folder, if it is there.
FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
LARGEST_FILE = 2**25  # bytes; that of CLIP has some 2**22


class Tokenizer:
    """CLIP's tokenizer.

    Attributes: vocab_size, and the ids sot (start of text), eot (end of text) and pad.
    """

    def __init__(
        self,
        backend: Any,
        specials: tuple[int, int, int],
        save: Callable[[str | os.PathLike], Any],
    ):
        """Wraps a `tokenizers.Tokenizer`, with the ids sot, eot and pad."""
        self._backend, self._save = backend, save
        backend.no_truncation()
        backend.no_padding()
        self.vocab_size: int = backend.get_vocab_size()
        self.sot, self.eot, self.pad = specials
        self._longest = max(map(len, backend.get_vocab()))  # of a token

    @classmethod
    def of_transformers(cls, wrapped: Any) -> "Tokenizer":
        """Wraps a CLIPTokenizer of transformers."""
        specials = wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id
        return cls(wrapped.backend_tokenizer, specials, wrapped.save_pretrained)

    def encode(
        self, texts: Sequence[str], context_length: int, warn: bool = True
    ) -> Int32[np.ndarray, "n {context_length}"]:
        """Start token, text, end token, then padding.

        A text that is too long is cut so that the end token still fits, with a warning
        unless told otherwise. Raises UserError for a text that is not valid Unicode.
        """
        tokens = np.full((len(texts), context_length), self.pad, np.int32)
        begun = [self._beginning(text, context_length) for text in texts]
        encodings = self._backend.encode_batch(begun, add_special_tokens=False)
        for row, text, encoding in zip(tokens, begun, encodings, strict=True):
            ids = [self.sot, *encoding.ids[: context_length - 2], self.eot]
            row[: len(ids)] = ids
            if warn and len(encoding.ids) > context_length - 2:
                warnings.warn(
                    f'"{textwrap.shorten(text, 60)}" is {len(encoding.ids)} tokens '
                    f"long, and was cut to the {context_length - 2} that are read",
                    stacklevel=2,
                )
        return tokens

    def check(self, vocab_size: int, eot: int, where: object) -> None:
        """Raise a UserError if CLIP's text tower can't read what this one writes.

        Args:
          vocab_size, eot: number of the tower's ids, and its end-of-text id.
          where: the model, for the message.
        """
        if self.vocab_size > vocab_size or self.eot != eot:
            raise UserError(
                f"{where}: the tokenizer has {self.vocab_size} ids, of which "
                f"{self.eot} ends a text; CLIP has {vocab_size} and {eot}: take the "
                "tokenizer that it was trained with"
            )

    def _beginning(self, text: str, context_length: int) -> str:
        """Return a text without what is far beyond its first `context_length` tokens.

        To encode a book would take minutes.
        """
        _check_unicode(text)
        # A token and the space before it; normalization may shorten a text fourfold.
        most = 4 * (self._longest + 1) * context_length
        return text if len(text) <= most else " ".join(text.split())[:most]

    def lengths(
        self, tokens: Int32[np.ndarray, "n context_length"]
    ) -> Int32[np.ndarray, " n"]:
        """How many tokens come before the padding, start and end included."""
        return (tokens == self.eot).argmax(axis=1).astype(np.int32) + 1

    def decode(self, tokens: Int32[np.ndarray, " context_length"]) -> str:
        """The text of one row of tokens, as the tokenizer saw it: in lower case."""
        text = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text.replace("</w>", " ").strip()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the files that `load`, and transformers, read."""
        self._save(folder)


def load(path: str | os.PathLike) -> Tokenizer:
    """A CLIP tokenizer from a folder, or by its name on the Hugging Face hub.

    Raises UserError if there is none.
    """
    local = Path(path).is_dir()
    if not local and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(path)):
        raise UserError(f"there is no folder {path} to load a tokenizer from")
    if local:
        check_files(path)
        _check_sizes(Path(path))
        if (saved := _read_saved(Path(path))) is not None:
            return saved
    try:
        wrapped = import_transformers().CLIPTokenizer.from_pretrained(str(path))
    # A damaged file surfaces as nearly any exception, the hub's as OSError.
    except Exception as error:
        where = "the folder" if local else "neither a folder here nor on the hub:"
        raise UserError(
            f"found no tokenizer, {where} {path} ({first_line(error)})"
        ) from error
    if len(wrapped) < SMALLEST:  # transformers makes up a vocabulary if it finds none
        raise UserError(
            f"the folder {path} holds no CLIP tokenizer: it needs tokenizer.json, "
            "or vocab.json and merges.txt"
        )
    specials = wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id
    for token in specials:
        if not isinstance(token, int) or not 0 <= token < len(wrapped):
            raise UserError(
                f"the tokenizer of {path} is damaged: start, end and padding have the "
                f"ids {specials}, of a vocabulary of {len(wrapped)}"
            )
    return Tokenizer.of_transformers(wrapped)


def _read_saved(folder: Path) -> Tokenizer | None:
    """Reads what transformers 5 has saved of a CLIPTokenizer, without transformers.

    To import it takes longer than all else that a model needs. None for a folder of
    another kind, or a damaged one, which transformers is left to tell of.
    """
    import tokenizers

    try:
        config = read_json(folder / "tokenizer_config.json")
        if config.get("backend") != "tokenizers" or (folder / FILES[0]).exists():
            return None
        if config.get("tokenizer_class") != "CLIPTokenizer":
            return None
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers has no class of its own for what it raises
        return None
    names = "bos_token", "eos_token", "pad_token"
    specials = tuple(backend.token_to_id(str(config.get(name))) for name in names)
    if None in specials or backend.get_vocab_size() < SMALLEST:
        return None
    saved = {
        name: (folder / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }

    def save(folder: str | os.PathLike) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in saved.items():
            (Path(folder) / name).write_bytes(content)

    return Tokenizer(backend, specials, save)


def _check_sizes(folder: Path) -> None:
    """Raise a UserError if a file would fill the memory."""
    for name in FILES:
        path = folder / name
        if path.is_file() and path.stat().st_size > LARGEST_FILE:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes: a tokenizer's has at most "
                f"{LARGEST_FILE:,}"
            )


def train(captions: Iterable[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Learns the merges of a vocabulary of at most `vocab_size` from captions.

    `context_length` is stored for those who load it with transformers. The order of the
    captions does not matter. Raises UserError if `vocab_size` is below 514, there are
    no captions, or one is not valid Unicode.
    """
    from tokenizers.trainers import BpeTrainer

    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: the bytes and the specials "
            f"alone are {SMALLEST}"
        )
    # The time grows with the square of a word's length.
    captions = sorted(caption[: 64 * context_length] for caption in captions)
    for caption in captions:
        _check_unicode(caption)
    if not captions:
        raise UserError("there are no captions to train a tokenizer on")
    alphabet = _byte_alphabet()
    backend = _clip(alphabet, [], context_length).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    merges = merges[: vocab_size - SMALLEST]
    return Tokenizer.of_transformers(_clip(alphabet, merges, context_length))


def blank(vocab_size: int, context_length: int) -> Tokenizer:
    """One with a vocabulary of that size, of made-up words: for its numbers alone."""
    alphabet = _byte_alphabet()
    merges = itertools.islice(
        itertools.product(alphabet, alphabet), vocab_size - SMALLEST
    )
    return Tokenizer.of_transformers(_clip(alphabet, list(merges), context_length))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{text[error.start]!r} is half of a character"
        raise UserError(f"{text[:60]!r} is not valid Unicode: {said}") from None


def _clip(alphabet: list[str], merges: list, context_length: int):
    """A CLIP tokenizer of transformers with these merges."""
    words = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    words += [first + second for first, second in merges]
    words = list(dict.fromkeys(words))  # two merges can make the same word
    words += SPECIALS
    return import_transformers().CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=[tuple(merge) for merge in merges],
        model_max_length=context_length,
    )


def import_transformers() -> ModuleType:
    """transformers, which would tell those without PyTorch that PyTorch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _byte_alphabet() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [
        chr(256 + i) for i in range(len(others))
    ]
