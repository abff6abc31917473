"""Decide which files of a source distribution are worth training on, and clean their text."""

from __future__ import annotations

import hashlib
import re

MIN_BYTES, MAX_BYTES = 700, 100_000
MIN_PARAGRAPH = 120  # characters; shorter paragraphs are too common to count as copied text
# Source files are kept for this many of every 100 paths, so that prose stays the larger share.
SOURCE_PERCENT = 7
SOURCE_PACKAGES = re.compile(
    r"astropy|attrs|click|dask|django|flask|ipython|jinja2|matplotlib|mypy|networkx|numba|numpy|pip|pyparsing|pytest|"
    r"scikit-learn|scipy|setuptools|sphinx|sqlalchemy|statsmodels|sympy|traitlets|twisted|werkzeug"
)
PROSE_FOLDERS = frozenset({"doc", "docs", "docs_api", "sites", "galleries"})
# Changelogs, lists of names, licences, test data, bundled third-party code and generated files.
UNWANTED = re.compile(
    r"changelog|changes|release|whats[_-]?new|news|history|announce|authors|contributors|credits|thanks|licen[sc]e|"
    r"copying|copyright|egg-info|(^|/)_?(tests?|testing|locale|_?vendor(ed)?|third_?party|extern(al)?|externals|"
    r"subprojects|_?templates?|deps|fixtures|migrations|conf|includes?|data|_build|_sources)(/|$)|(^|/)test_|_test\.py|"
    r"(^|/)conftest|vendored|requirements|_version\.py|/\.|cmakelists|_pb2|(lex|yacc|parse)tab|unicode|mathjax"
)
# Text under these terms is left out even where it sits inside a permissively licensed package.
OTHER_TERMS = re.compile(
    r"creative commons|cc[- ]by|general public licen|\bL?GPL|apache licen|mozilla public|numerical recipes|"
    r"public domain|all rights reserved\. no part",
    re.IGNORECASE,
)


def wanted_kind(path: str, size: int) -> bool:
    """Say whether `path` (`<package>/<path in archive>`, `size` bytes) is prose, or sampled source, worth reading."""
    package, _, inner = path.partition("/")
    lowered = inner.lower()
    if not MIN_BYTES <= size <= MAX_BYTES or UNWANTED.search(lowered):
        return False
    if lowered.endswith((".rst", ".txt", ".md")):
        return lowered.split("/", 1)[0] in PROSE_FOLDERS
    if not lowered.endswith(".py") or not SOURCE_PACKAGES.fullmatch(package) or size > 60_000:
        return False
    bucket = int.from_bytes(hashlib.sha256(b"source:" + path.encode()).digest()[:8], "big") % 100
    return bucket < SOURCE_PERCENT


def clean(data: bytes) -> str | None:
    """Return normalised text, or None where the file is not mostly readable ASCII under the package's own terms."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if OTHER_TERMS.search(text) or sum(ord(c) > 127 for c in text) > 0.01 * len(text):
        return None
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "").replace("\ufeff", "").expandtabs(4)
    lines = [line.rstrip() for line in text.split("\n")]
    kept = [line for line in lines if not _is_noise(line)]
    if len(kept) < 0.7 * len(lines):
        return None
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"
    letters = sum(c.isalpha() or c.isspace() for c in text)
    return text if len(text) >= MIN_BYTES and letters >= 0.7 * len(text) else None


def _is_noise(line: str) -> bool:
    """Recognise number dumps, drawn tables and over-long lines; they teach nothing and cost many tokens."""
    stripped = line.strip()
    if len(stripped) > 300:
        return True
    if len(stripped) < 24:
        return False
    digits = sum(c.isdigit() or c in ".,-+[]()|eE" for c in stripped if c != " ")
    return digits > 0.6 * len(stripped.replace(" ", "")) and not set(stripped) <= set("-=~^*+#. ")


def drop_shared_paragraphs(texts: list[str]) -> list[str | None]:
    """Keep each long paragraph only where it first occurs, so that no split can hold a copy of another's text.

    A document that loses more than a third of its characters this way is a near-duplicate and becomes None.
    """
    seen: set[bytes] = set()
    results: list[str | None] = []
    for text in texts:
        kept, fresh = [], []
        for paragraph in text.split("\n\n"):
            normal = " ".join(paragraph.lower().split())
            digest = hashlib.sha256(normal.encode()).digest()[:16]
            if len(normal) >= MIN_PARAGRAPH and digest in seen:
                continue
            kept.append(paragraph)
            fresh.append(digest)
        joined = "\n\n".join(kept).strip() + "\n"
        if len(joined) < max(MIN_BYTES, 0.66 * len(text)):
            results.append(None)
            continue
        seen.update(fresh)
        results.append(joined)
    return results
