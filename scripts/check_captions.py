"""What the text encoder gets of captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from check_result import CaptionTokens

from ldm.modules.encoders.tokenizer import MOST_CHUNKS, build_tokenizer, caption_ids

DEFAULT_LENGTH: Final = 77
"""Tokens that Stable Diffusion's text encoder takes, begin and end included."""

WORD_END: Final = "</w>"
_AT_A_TIME: Final = 10_000


def caption_room(config: Mapping[str, Any]) -> int:
    """Give how many tokens of a caption the configured text encoder takes, begin and end left out."""
    encoder = ((config.get("model") or {}).get("params") or {}).get("cond_stage_config")
    params = (encoder.get("params") or {}) if isinstance(encoder, dict) else {}
    chunks = MOST_CHUNKS if params.get("long_captions") == "chunk" else 1
    return (int(params.get("max_length", DEFAULT_LENGTH)) - 2) * chunks


def count_tokens(captions: Mapping[str, int], room: int) -> CaptionTokens:
    """Split captions as the text encoder does.

    Args:
        captions: number of pictures by caption.
        room: tokens that it takes of each.

    Returns:
        Their lengths, what is cut, and the words that take several tokens.
    """
    tokenizer = build_tokenizer()
    lengths: dict[str, int] = {}
    cut: dict[str, str] = {}
    split: Counter[str] = Counter()
    every = list(captions)
    for start in range(0, len(every), _AT_A_TIME):
        some = every[start : start + _AT_A_TIME]
        tokenizer.backend_tokenizer.no_truncation()
        encoded = tokenizer.backend_tokenizer.encode_batch(some, add_special_tokens=False)
        for caption, encoding in zip(some, encoded, strict=True):
            lengths[caption] = len(encoding.ids)
            if len(encoding.ids) > room:
                cut[caption] = tokenizer.decode(encoding.ids[room:]).strip()
            for word in set(_split_words(encoding.tokens)):
                split[word] += captions[caption]
    return CaptionTokens(room, lengths, cut, sorted(split.items(), key=lambda item: (-item[1], item[0])))


def _split_words(tokens: Sequence[str]) -> Iterable[str]:
    """Yield the words that take several tokens, with a bar where they are split."""
    parts: list[str] = []
    for token in tokens:
        parts.append(token.removesuffix(WORD_END))
        if token.endswith(WORD_END):
            # Letters beyond ASCII are several tokens whose parts no reader knows.
            if len(parts) > 1 and all(part.isascii() for part in parts):
                yield "|".join(parts)
            parts = []


def split_caption(caption: str) -> list[str]:
    """Split one caption into its tokens, as text; a part of a letter is shown as a replacement character."""
    tokenizer = build_tokenizer()
    return [tokenizer.decode([token]).strip() for token in caption_ids([caption])[0]]
