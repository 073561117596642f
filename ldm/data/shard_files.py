"""Where a data set's tar shards are: files of this machine, or copies of URLs, each with its index.

Local shards are read where they lie. A shard at a URL is fetched whole when it is first needed, into a folder
of bounded size that all processes of a machine share. Indices are kept in the same folder, so a picture
folder needs to be readable only, and indices outlive the copies they were built from.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit

import requests
from filelock import FileLock, Timeout

from ldm.data.tar_index import ShardIndex, build_index, read_index, write_index

T = TypeVar("T")

logger = logging.getLogger(__name__)

GIB: Final = 1 << 30

ATTEMPTS: Final = 6
"""How often a URL is tried without a byte of progress."""

_BRACES: Final = re.compile(r"\{([^{}]*)\}")
_RANGE: Final = re.compile(r"(\d+)\.\.(\d+)")
_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_GLOB: Final = re.compile(r"[*?\[]")
_COPY: Final = re.compile(r"-[0-9a-f]{24}\.tar\Z")  # copies; the folder may hold other shards too
_CHUNK_BYTES: Final = 1 << 16  # of what a broken connection had sent, less than this is lost
_TIMEOUT_SECONDS: Final = (15.0, 60.0)  # to connect, and between two pieces of the answer
_LONGEST_PAUSE_SECONDS: Final = 60.0
_PASSING_STATUS: Final = (408, 425, 429, 500, 502, 503, 504)
_FETCHED_AT_A_TIME: Final = 4
_PROGRESS_SECONDS: Final = 15.0


class BadAnswerError(requests.ConnectionError):
    """A server sent something else than was asked for."""


def is_url(shard: str) -> bool:
    """Tell a URL from a path of this machine."""
    return "://" in shard


def public_name(shard: str) -> str:
    """Name a shard for logs and ledgers: a URL without what follows its path, which may be a key to it."""
    if not is_url(shard):
        return shard
    address = urlsplit(shard)
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}"


def expand_braces(pattern: str) -> list[str]:
    """Write out what stands in braces.

    Args:
        pattern: text with any number of ``{00000..00099}`` (ranges of whole numbers, padded as their first
            number is) and ``{a,b}``.

    Returns:
        Every combination, the last brace changing fastest; the text itself where it has no braces.

    Raises:
        ValueError: braces hold neither a range nor a list.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    inner = found.group(1)
    span = _RANGE.fullmatch(inner)
    if span is not None:
        first, last = int(span.group(1)), int(span.group(2))
        if last < first:
            raise ValueError(f"{{{inner}}} in {pattern} runs backwards; write {{{span.group(2)}..{span.group(1)}}}")
        width = len(span.group(1))
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    elif "," in inner:
        words = inner.split(",")
    else:
        raise ValueError(
            f"{{{inner}}} in {pattern} is neither a range such as {{00000..00099}} nor a list such as {{a,b}}"
        )
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + word + rest for word in words for rest in expand_braces(after)]


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """List the tar files that a config names.

    Args:
        shards: one or several of: a tar file; a folder of them; a pattern with ``*`` or ``?``; an http or https
            URL; paths and URLs with braces (see :func:`expand_braces`).

    Returns:
        Paths and URLs in the order given, those of one folder or pattern by name.

    Raises:
        ValueError: something names no shard, or one comes twice; a line for each problem.
    """
    given = [shards] if isinstance(shards, str) else list(shards)
    problems: list[str] = []
    found: list[str] = []
    for word in given:
        try:
            found += _expand(word)
        except ValueError as error:
            problems.append(f"shards: {error}")
    twice = sorted({shard for shard in found if found.count(shard) > 1}) if len(set(found)) < len(found) else []
    problems += [f"shards: {shard} is named twice" for shard in twice]
    if not found and not problems:
        problems.append("shards: names no tar file; give a folder, a pattern such as laion/{00000..00099}.tar, or URLs")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _expand(word: str) -> list[str]:
    if is_url(word):
        if urlsplit(word).scheme not in ("http", "https"):
            raise ValueError(f"{word} is no http or https URL; fetch the shards and name their folder")
        return expand_braces(word)
    if os.path.isdir(word):
        tars = sorted(name for name in os.listdir(word) if name.lower().endswith(".tar") and not name.startswith("."))
        if not tars:
            raise ValueError(f"{word} holds no .tar files")
        return [os.path.join(word, name) for name in tars]
    if os.path.isfile(word):
        return [word]
    found: list[str] = []
    missing: list[str] = []
    for pattern in expand_braces(os.path.expanduser(word)):
        matches = sorted(glob.glob(pattern)) if _GLOB.search(pattern) else [pattern] * os.path.isfile(pattern)
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        more = f" (and {len(missing) - 1} more that {word} names)" if len(missing) > 1 else ""
        raise ValueError(f"{missing[0]} does not exist{more} (looked in {os.getcwd()})")
    return found


def shard_names(shards: Sequence[str]) -> list[str]:
    """Name shards by the end of their paths, so that machines with other folders agree.

    Args:
        shards: paths and URLs, no two the same.

    Returns:
        ``folder/file`` for each; more folders where two would have the same name.
    """
    parts = [_path_parts(shard) for shard in shards]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        names = ["/".join(words[-depth:]) for words in parts]
        if len(set(names)) == len(names):
            return names
    return list(shards)


def _path_parts(shard: str) -> list[str]:
    if is_url(shard):
        address = urlsplit(shard)
        return [address.netloc, *(unquote(word) for word in address.path.split("/") if word)]
    return [word for word in os.path.abspath(shard).replace("\\", "/").split("/") if word]


class ShardFiles:
    """The shards of a data set, their local files and their indices.

    Args:
        shards: paths and URLs of tar files.
        cache_dir: folder for indices and for copies of URLs.
        cache_gib: how much the copies may take together, in GiB; the longest unused go first.
        pause_seconds: wait after a first failed attempt to fetch; it doubles with each further one.

    Attributes:
        shards: as given.
        cache_gib: as given.
    """

    def __init__(self, shards: Sequence[str], cache_dir: str, cache_gib: float, pause_seconds: float = 1.0) -> None:
        self.shards = list(shards)
        self._cache_dir = os.path.abspath(os.path.expanduser(cache_dir))
        self._cache_bytes = int(cache_gib * GIB)
        self.cache_gib = cache_gib
        self._pause_seconds = pause_seconds
        self._ahead: queue.SimpleQueue[int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the thread that fetches ahead: it belongs to the process that plans."""
        return {**self.__dict__, "_ahead": None}

    def local_path(self, number: int) -> str:
        """Give a shard's file on this machine, fetching it if need be.

        A copy may be removed at any time to make room for another; :meth:`in_use` keeps it.

        Raises:
            OSError: it cannot be fetched; names the URL.
        """
        shard = self.shards[number]
        if not is_url(shard):
            return shard
        path = self._copy_path(shard)
        with suppress(FileNotFoundError):
            if self._is_whole(shard, path):
                os.utime(path)  # the longest unused copies go first
                return path
        with self.in_use(number):
            return path

    @contextmanager
    def in_use(self, number: int, attempts: int = ATTEMPTS) -> Iterator[str]:
        """Keep a shard's file on this machine, fetching it if need be, for as long as the context lasts.

        Args:
            number: the shard.
            attempts: how often to try without a byte of progress.

        Yields:
            Its path.

        Raises:
            OSError: it cannot be fetched; names the URL.
        """
        shard = self.shards[number]
        if not is_url(shard):
            yield shard
            return
        path = self._copy_path(shard)
        with self._lock(path):
            if not self._is_whole(shard, path):
                self._fetch(shard, path, attempts)
            os.utime(path)
            yield path

    def index(self, number: int, attempts: int = ATTEMPTS) -> ShardIndex:
        """Give a shard's index, building it if there is none or it is of another state of the tar.

        Args:
            number: the shard.
            attempts: how often to try to fetch it without a byte of progress.

        Raises:
            OSError: the shard cannot be fetched or read; names it.
        """
        index = self._kept_index(number)
        if index is not None:
            return index
        with self._lock(self._index_path(number)):
            index = self._kept_index(number)  # another process may have been faster
            if index is None:
                with self.in_use(number, attempts) as path:
                    index = build_index(path, self._stamp(number))
                    if index.damage and is_url(self.shards[number]):
                        # Servers that do not tell a length may break off unnoticed.
                        os.remove(path)
                        self._fetch(self.shards[number], path, attempts)
                        index = build_index(path, self._stamp(number))
                write_index(index, self._index_path(number))
        return index

    def indices(self, numbers: Sequence[int]) -> list[ShardIndex]:
        """Give the indices of several shards, several at a time.

        Raises:
            OSError: shards cannot be fetched or read; a line for each.
        """
        missing = [number for number in numbers if not os.path.exists(self._index_path(number))]
        if missing:
            logger.info(
                "%s %d shard%s, once; kept in %s",
                "fetching and indexing" if any(is_url(self.shards[number]) for number in missing) else "indexing",
                len(missing),
                "" if len(missing) == 1 else "s",
                self._cache_dir,
            )
        with ThreadPoolExecutor(max_workers=_FETCHED_AT_A_TIME) as pool:
            found = list(_report_progress(pool.map(self._index_or_reason, numbers), len(numbers)))
        reasons = [result for result in found if isinstance(result, str)]
        if reasons:
            raise OSError("\n".join(reasons))
        return [result for result in found if isinstance(result, ShardIndex)]

    def _index_or_reason(self, number: int) -> ShardIndex | str:
        try:
            return self.index(number)
        except OSError as error:
            return str(error)

    def check_state(self, number: int, index: ShardIndex, path: str) -> None:
        """Check that a tar is still the one that its index was built from.

        Raises:
            OSError: it has another size, or came with another ETag.
        """
        if os.path.getsize(path) != index.tar_bytes or (
            is_url(self.shards[number]) and self._stamp(number) != index.stamp
        ):
            raise OSError(
                f"{public_name(self.shards[number])}: has changed since its index was built; start anew, after "
                f"removing {self._index_path(number)}"
            )

    def fetch_ahead(self, numbers: Iterable[int]) -> None:
        """Fetch and index shards in the background, in turn, in place of what is still to be fetched so.

        Args:
            numbers: the shards; local ones are passed over.
        """
        wanted = [number for number in numbers if is_url(self.shards[number])]
        with suppress(queue.Empty):
            while self._ahead is not None:
                self._ahead.get_nowait()
        if not wanted:
            return
        if self._ahead is None:
            self._ahead = queue.SimpleQueue()
            threading.Thread(target=self._keep_fetching, args=(self._ahead,), name="fetch shards", daemon=True).start()
        for number in wanted:
            self._ahead.put(number)

    def _keep_fetching(self, numbers: queue.SimpleQueue[int]) -> None:
        while True:
            number = numbers.get()
            try:
                self.index(number, attempts=1)
                with self.in_use(number, attempts=1):
                    pass
            except OSError as error:
                logger.warning("fetching ahead: %s; it is tried again when it is needed", error)

    def _kept_index(self, number: int) -> ShardIndex | None:
        index = read_index(self._index_path(number))
        if index is None or is_url(self.shards[number]):
            # The index of a URL is checked against the tar whenever that is read: it may long outlive the copy.
            return index
        try:
            found = os.stat(self.shards[number])
        except OSError as error:
            raise OSError(f"{self.shards[number]}: {error.strerror}") from error
        return index if (found.st_size, str(found.st_mtime_ns)) == (index.tar_bytes, index.stamp) else None

    def _stamp(self, number: int) -> str:
        shard = self.shards[number]
        if not is_url(shard):
            return str(os.stat(shard).st_mtime_ns)
        return str(self._fetched(shard).get("stamp", ""))

    def _index_path(self, number: int) -> str:
        shard = self.shards[number]
        return self._place("indices", shard if is_url(shard) else os.path.abspath(shard), ".npz")

    def _place(self, kind: str, identity: str, suffix: str) -> str:
        folder = os.path.join(self._cache_dir, kind)
        os.makedirs(folder, exist_ok=True)
        digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        stem = re.sub(r"[^0-9A-Za-z._-]", "_", _path_parts(identity)[-1].removesuffix(".tar"))[:40]
        return os.path.join(folder, f"{stem}-{digest}{suffix}")

    def _lock(self, path: str) -> FileLock:
        # Made for each use: a lock that another thread of this process holds must be waited for as well.
        return FileLock(f"{path}.lock")

    def _fetched(self, url: str) -> dict[str, Any]:
        """Read what is noted about a copy: the length that it must have, and its ETag or time of change."""
        try:
            with open(self._place("shards", url, ".json"), encoding="utf-8") as file:
                noted = json.load(file)
        except (OSError, ValueError):
            return {}
        return noted if isinstance(noted, dict) else {}

    def _copy_path(self, url: str) -> str:
        return self._place("shards", url, ".tar")

    def _fetch(self, url: str, path: str, attempts: int) -> None:
        try:
            self._download(url, path, attempts)
        except requests.RequestException as error:
            raise OSError(f"{public_name(url)}: cannot be fetched: {_reason(error)}") from error
        except OSError as error:
            if error.filename is None:
                raise
            raise OSError(f"{public_name(url)}: cannot be kept as {error.filename}: {error.strerror}") from error

    def _is_whole(self, url: str, path: str) -> bool:
        return os.path.isfile(path) and os.path.getsize(path) == self._fetched(url).get("length")

    def _download(self, url: str, path: str, attempts: int) -> None:
        """Fetch a URL to a file, going on where a connection broke."""
        part = f"{path}.part"
        failures = 0
        while True:
            had = _size(part)
            try:
                self._download_rest(url, part)
                break
            except requests.RequestException as error:
                status = error.response.status_code if error.response is not None else None
                failures = failures + 1 if _size(part) <= had else 1
                if failures >= attempts or (status is not None and status not in _PASSING_STATUS):
                    raise
                pause = min(self._pause_seconds * 2 ** (failures - 1), _LONGEST_PAUSE_SECONDS)
                logger.warning("%s: %s; trying again in %.0f s", public_name(url), _reason(error), pause)
                time.sleep(pause)
        os.replace(part, path)

    def _download_rest(self, url: str, part: str) -> None:
        had, noted = _size(part), self._fetched(url)
        headers = {"Accept-Encoding": "identity"}
        if had and noted.get("stamp"):
            # The server sends the rest of the same file, or the whole of a newer one.
            headers |= {"Range": f"bytes={had}-", "If-Range": noted["stamp"]}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer:
            if answer.status_code == 416:
                os.remove(part)
                raise BadAnswerError("the part that was fetched before does not fit; it begins anew")
            answer.raise_for_status()
            goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {had}-")
            if answer.status_code == 206 and not goes_on:
                raise BadAnswerError(f"asked for bytes from {had}, got {answer.headers.get('Content-Range')}")
            start = had if goes_on else 0
            stated = answer.headers.get("Content-Length")
            if stated is not None and not _DIGITS.fullmatch(stated):
                raise BadAnswerError(f"it states a length of {stated[:40]!r} bytes")
            length = start + int(stated) if stated is not None else None
            if length is not None:
                self._make_room(url, length)
            stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            self._note(url, {"url": public_name(url), "length": length, "stamp": stamp})
            with open(part, "ab" if goes_on else "wb") as file:
                for chunk in answer.iter_content(_CHUNK_BYTES):
                    file.write(chunk)
                    if length is None and file.tell() > self._cache_bytes:  # it need never end
                        self._make_room(url, file.tell())
        have = _size(part)
        if length is None:
            self._note(url, {"url": public_name(url), "length": have, "stamp": stamp})
        elif have != length:
            raise BadAnswerError(f"got {have:,} of {length:,} bytes")

    def _note(self, url: str, note: dict[str, Any]) -> None:
        path = self._place("shards", url, ".json")
        part = f"{path}.part"
        with open(part, "w", encoding="utf-8") as file:
            json.dump(note, file)
        os.replace(part, path)

    def _make_room(self, url: str, length: int) -> None:
        """Remove the longest unused copies until one of a length fits."""
        if length > self._cache_bytes:
            raise OSError(
                f"{public_name(url)}: its {length / GIB:.2f} GiB are more than shard_cache_gib "
                f"{self.cache_gib:g} allows all copies together; raise it"
            )
        folder = os.path.join(self._cache_dir, "shards")
        with self._lock(folder):
            copies = []
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _COPY.search(entry.name):
                        copies.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
            total = sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if total + length <= self._cache_bytes:
                    break
                # Not what is being read, though the copies then take more for a while. Windows refuses by itself.
                with suppress(Timeout, PermissionError), self._lock(path).acquire(timeout=0):
                    os.remove(path)
                    total -= size
                    logger.debug("removed %s to make room for %s", path, public_name(url))


def _reason(error: requests.RequestException) -> str:
    """Say what went wrong without the address, which requests repeats with all that follows its path."""
    if error.response is not None:
        return f"the server answers {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer in time"
    if isinstance(error, BadAnswerError):
        return str(error)
    return f"the connection broke or cannot be made ({type(error).__name__})"


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _report_progress(results: Iterator[T], total: int) -> Iterator[T]:
    """Hand results on, and say now and then how many there were."""
    said = time.monotonic()
    for number, result in enumerate(results, 1):
        yield result
        if time.monotonic() - said > _PROGRESS_SECONDS and number < total:
            said = time.monotonic()
            logger.info("indexed %d of %d shards", number, total)
