"""Suggestions for a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to two known names that may have been meant."""
    plain, wanted = {_plain(other): other for other in known}, _plain(name)
    if wanted in plain:
        return [plain[wanted]]
    last = wanted.rpartition(".")[2]
    ends = {other.rpartition(".")[2]: other for other in reversed(plain)}
    same_end = [other for other in plain if other.rpartition(".")[2] == last]
    by_end = [ends[end] for end in difflib.get_close_matches(last, ends, 2, 0.7)]
    return [plain[other] for other in (same_end or _close(wanted, plain) or by_end)[:2]]


def _plain(name: str) -> str:
    return name.replace("-", "_").lower()


def _close(wanted: str, known: Iterable[str]) -> list[str]:
    """Known names that are similar to the wanted one, nearly as much as the most similar."""
    likeness = {name: difflib.SequenceMatcher(None, wanted, name).ratio() for name in known}
    least = max(0.6, max(likeness.values()) - 0.05)
    return sorted((name for name in likeness if likeness[name] >= least), key=likeness.get, reverse=True)
