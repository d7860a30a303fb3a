"""Shared text: hashes of eight-word runs, and the groups of clients that they connect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt64

WORDS = 8
"""Words in a shingle: shorter runs are idiom and boilerplate, longer ones miss edited copies."""

_BYTE_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD_BASE = np.uint64(0xD6E8FEB86659FD93)


def shingles(
    texts: Sequence[str], words: int = WORDS
) -> tuple[UInt64[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Hashes of every run of `words` words, and which text each is in.

    Words are what whitespace separates, in lower case, so line breaks do not matter. Each word is
    a polynomial in its bytes modulo 2^64, each run a polynomial in its mixed words: two different
    runs collide with probability about 2^-64. A text with fewer words has no shingle.

    Cost: a few vector passes over the bytes, about 15 MB of text a second on one core.

    >>> hashes, owner = shingles(["a b c d", "x", "z A b  c"], words=3)
    >>> owner.tolist(), hashes[0] == hashes[3]
    ([0, 0, 2, 2], np.True_)
    """
    split = [text.lower().split() for text in texts]
    counts = np.array([len(s) for s in split], dtype=np.int64)
    if counts.sum() < words:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    mixed = _mix(_word_hashes(" ".join(" ".join(s) for s in split if s)))
    owner = np.repeat(np.arange(len(texts)), counts)
    last = len(mixed) - words + 1
    hashes = np.zeros(last, np.uint64)
    for j in range(words):
        hashes = hashes * _WORD_BASE + mixed[j : j + last]
    inside = owner[:last] == owner[words - 1 :]
    return _mix(hashes[inside]), owner[:last][inside]


def text_hashes(texts: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """One hash of each whole text, lower case, whitespace aside; 0 for an empty one.

    >>> a, b, c = text_hashes(["One  two", "one two ", ""])
    >>> a == b, int(c)
    (np.True_, 0)
    """
    joined = ["_".join(text.lower().split()) for text in texts]
    hashes = np.zeros(len(texts), np.uint64)
    filled = np.array([bool(j) for j in joined], dtype=bool)
    if filled.any():
        hashes[filled] = _mix(_word_hashes(" ".join(j for j in joined if j)))
    return hashes


def keys(texts: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """Distinct hashes by which two sets of texts are found to share text.

    All shingles, and the whole of each text that is too short to have one: a sentence of a language
    written without spaces is one word.
    """
    hashes, owner = shingles(texts)
    whole = text_hashes(texts)
    whole[owner] = 0
    return np.unique(np.concatenate([hashes, whole[whole > 0]]))


def components(texts: Iterable[tuple[str, Sequence[str]]]) -> list[tuple[str, ...]]:
    """Clients grouped so that no two groups share a run of eight words, largest group first.

    Texts of fewer words link clients when they are identical.

    Cost: sorting the distinct shingles; memory: about 12 bytes for each shingle of each client.

    Args:
        texts: client id and its texts; read once, one client at a time.

    >>> long = "one two three four five six seven eight"
    >>> components([("a", [long + " x"]), ("b", ["z"]), ("c", ["y " + long])])
    [('a', 'c'), ('b',)]
    """
    ids, found = [], []
    for name, examples in texts:
        ids.append(name)
        found.append(keys(examples))
    parent = list(range(len(ids)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b in _linked(found):
        parent[root(a)] = root(b)
    groups: dict[int, list[str]] = {}
    for i, name in enumerate(ids):
        groups.setdefault(root(i), []).append(name)
    return sorted((tuple(g) for g in groups.values()), key=lambda g: (-len(g), g))


def _linked(found: Sequence[UInt64[np.ndarray, " n"]]) -> Iterator[tuple[int, int]]:
    """Pairs of positions that connect all those that hold a common hash.

    One slice of the hash range at a time, so that only a fraction is sorted at once.
    """
    edges = [np.uint64(i << 60) for i in range(16)]
    cuts = [[*np.searchsorted(hashes, edges).tolist(), len(hashes)] for hashes in found]
    for i in range(16):
        pieces = [h[cut[i] : cut[i + 1]] for h, cut in zip(found, cuts, strict=True)]
        if not pieces:
            return
        values = np.concatenate(pieces)
        order = np.argsort(values, kind="stable")
        owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])[order]
        same = values[order[1:]] == values[order[:-1]]
        pairs = np.unique(owner[:-1][same] * len(found) + owner[1:][same])
        yield from (divmod(pair, len(found)) for pair in pairs.tolist())


def _word_hashes(joined: str) -> UInt64[np.ndarray, " words"]:
    """One polynomial in the bytes of each word of a text with single spaces."""
    data = np.frombuffer((joined + " ").encode("utf-8", "surrogatepass"), np.uint8)
    ends = np.flatnonzero(data == ord(" "))
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    powers = np.cumprod(np.full(lengths.max(), _BYTE_BASE))
    place = np.arange(len(data)) - np.repeat(starts, lengths)
    return np.add.reduceat(data * powers[place], starts)


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, " n"] = x ^ (x >> np.uint64(31))
    return mixed
