"""The pages: one to try the model on, one that says how a program asks. Each is one file."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedtl.errors import printable
from fedtl.serve.predictor import MAX_EXAMPLES, Predictor

TEMPLATES = Path(__file__).parent / "templates"


def try_page(predictor: Predictor) -> tuple[str, str]:
    """The page to drop a picture on, or to type a text or a row into; and its content policy."""
    card = predictor.card
    metrics = card.get("metrics") or {}
    return _render(
        "try.html.j2",
        {
            "title": f"{card.get('name', 'model')}: try it",
            "name": card.get("name", "model"),
            "kind": predictor.kind,
            "labels": predictor.labels,
            "width": predictor.preprocessing.get("width"),
            "accuracy": metrics.get("accuracy"),
            "limits": card.get("limits", []),
        },
        "try.js",
    )


def docs_page(schema: Mapping[str, Any]) -> tuple[str, str]:
    """What ``/openapi.json`` says, for people; and its content policy."""
    calls = [
        {"path": path, "method": method.upper(), **told}
        for path, methods in schema["paths"].items()
        for method, told in methods.items()
    ]
    content = {"title": schema["info"]["title"], "calls": calls, "most": MAX_EXAMPLES}
    return _render("docs.html.j2", content, None)


def _render(template: str, content: Mapping[str, Any], script: str | None) -> tuple[str, str]:
    style = (TEMPLATES / "style.css").read_text()
    own = "" if script is None else (TEMPLATES / script).read_text()
    text = (
        _environment()
        .get_template(template)
        .render(**content, style=Markup(style), script=Markup(own))
    )
    policy = (
        "default-src 'none'; "
        f"style-src '{_hash(style)}'; "
        f"script-src {repr(_hash(own)) if own else repr('none')}; "
        "img-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    found.filters["printable"] = lambda value: printable(str(value))
    found.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    return found
