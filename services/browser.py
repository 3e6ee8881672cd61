"""The pages for people: one HTML file each, complete in itself, in services/pages/."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from services.fields import FIELDS

PAGES = Path(__file__).resolve().parent / "pages"
NO_FIELDS = '<script type="application/json" id="fields">[]</script>'


class BrowserPage(NamedTuple):
    """An HTML document, and the Content-Security-Policy that lets it do what it has to."""

    html: bytes
    policy: str


def load(name: str) -> BrowserPage:
    """The page of this name. Its policy allows its own script and style, by their hashes, and calls
    to Gatehouse: no other script can run in it, whatever a user is called."""
    html = (PAGES / f"{name}.html").read_text(encoding="utf-8")
    fields = [{"name": one.name, "kind": one.kind, "required": one.required} for one in FIELDS]
    html = html.replace(NO_FIELDS, NO_FIELDS.replace("[]", json.dumps(fields)))
    [style] = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}';"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )
    return BrowserPage(html.encode(), policy)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
