"""Find and download one pinned source distribution through the simple API of the package index pip is set up with."""

from __future__ import annotations

import hashlib
import html
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urldefrag, urljoin

TIMEOUT_SECONDS = 120


def index_url() -> str:
    """Return the address of the simple index: the environment's, then pip's setting, then pip's own default."""
    configured = os.environ.get("PIP_INDEX_URL", "")
    if not configured:
        command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not configured:
        from pip._internal.models.index import PyPI

        configured = PyPI.simple_url
    return configured.rstrip("/") + "/"


def find_link(name: str, version: str) -> str:
    """Return the download address of `name`-`version`.tar.gz as the index page lists it."""
    page = index_url() + name + "/"
    request = urllib.request.Request(page, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        body = response.read().decode()
    plain = re.sub(r"[-_.]+", "-", name).lower()
    for href, label in re.findall(r'<a\s[^>]*href="([^"]+)"[^>]*>([^<]+)</a>', body):
        stem, found, _ = label.strip().rpartition(f"-{version}.tar.gz")
        if found and re.sub(r"[-_.]+", "-", stem).lower() == plain:
            return urldefrag(urljoin(page, html.unescape(href))).url
    raise OSError(f"The package index lists no source distribution of {name} {version}.")


def fetch_sdist(name: str, version: str, sha256: str, cache: Path) -> Path:
    """Return the verified archive of one pin, downloading it into `cache` at the first use."""
    target = cache / f"{name}-{version}.tar.gz"
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
        return target
    try:
        with urllib.request.urlopen(find_link(name, version), timeout=TIMEOUT_SECONDS) as response:
            data = response.read()
    except urllib.error.URLError as error:
        raise OSError(f"Downloading {name} {version} failed: {error}.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise OSError(f"The archive of {name} {version} does not have the pinned sha256, so it was not used.")
    cache.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return target
