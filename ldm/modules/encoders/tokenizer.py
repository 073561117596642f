"""The CLIP byte-pair tokeniser, built from an installed package: nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

from transformers import CLIPTokenizer

VOCABULARY_SIZE = 49408
BEGIN_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"

MOST_CHUNKS: Final = 3
"""Chunks of a long caption: 3 of 75 tokens are 225."""

COMMA: Final = 267
"""Id of a comma that stands alone."""

COMMA_REACH: Final = 20
"""How many tokens before a chunk's end a comma may stand for the chunk to end behind it."""


def _vocabulary_path() -> Path:
    """Find the vocabulary file without importing the package that carries it (which would load vision models)."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    raise OSError(
        "the CLIP vocabulary (bpe_simple_vocab_16e6.txt.gz) was not found; it comes with the package "
        "open-clip-torch: pip install open-clip-torch"
    )


def _byte_characters() -> list[str]:
    """List the 256 characters that stand for bytes in the vocabulary file, in the vocabulary's order.

    Printable Latin-1 bytes stand for themselves and come first; the rest follow as characters from 256 up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


@lru_cache(maxsize=1)
def build_tokenizer() -> CLIPTokenizer:
    """Build the tokeniser that Stable Diffusion v1's text encoder was trained with.

    Returns:
        A transformers tokeniser with 49,408 ids; 49406 begins a text, 49407 ends and pads it.

    Raises:
        OSError: the vocabulary file is not installed.
    """
    characters = _byte_characters()
    merge_count = VOCABULARY_SIZE - 2 * len(characters) - 2
    with gzip.open(_vocabulary_path(), "rt", encoding="utf-8") as file:
        merges = file.read().split("\n")[1 : merge_count + 1]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += ["".join(merge.split()) for merge in merges] + [BEGIN_OF_TEXT, END_OF_TEXT]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[tuple(merge.split()) for merge in merges]
    )


def caption_ids(captions: Sequence[str]) -> list[list[int]]:
    """Turn captions into token ids, whole: without begin and end, neither cut nor padded.

    Args:
        captions: texts.

    Returns:
        The ids of each.
    """
    backend = build_tokenizer().backend_tokenizer
    # Whoever calls the tokeniser with truncation leaves it switched on, for everyone in the process.
    backend.no_truncation()
    backend.no_padding()
    # One by one: a batch would start threads, which loader processes that are forked later cannot do without.
    return [backend.encode(caption, add_special_tokens=False).ids for caption in captions]


def split_into_chunks(ids: Sequence[int], room: int, most: int) -> list[list[int]]:
    """Split a caption into chunks that are encoded separately, as web UIs split long prompts.

    A chunk ends behind the last comma of its last :data:`COMMA_REACH` tokens, so that no phrase is torn; without one
    there, or where the rest would then no longer fit, it is filled up.

    Args:
        ids: the caption's token ids, begin and end left out.
        room: most ids of a chunk.
        most: most chunks.

    Returns:
        At least one chunk, and at most ``most``; together they are the first ``room * most`` ids, in order.
    """
    rest = list(ids[: room * most])
    chunks: list[list[int]] = []
    while len(rest) > room:
        end = _chunk_end(rest, room, room * (most - len(chunks) - 1))
        chunks.append(rest[:end])
        rest = rest[end:]
    return [*chunks, rest]


def _chunk_end(ids: Sequence[int], room: int, room_after: int) -> int:
    """Find where the first chunk ends of more ids than it has room for; what follows has to fit into ``room_after``."""
    if ids[room] == COMMA:  # it begins the next chunk, and closes a phrase that fills this one
        return room
    for end in range(room, max(room - COMMA_REACH, 0), -1):
        if ids[end - 1] == COMMA and len(ids) - end <= room_after:
            return end
    return room
