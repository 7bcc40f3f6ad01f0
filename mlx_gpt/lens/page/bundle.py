"""Join the page's template, style, modules and data into one HTML file that loads nothing else.

The modules in ``js/`` are plain ES modules that import each other by relative path, one import a line. Here they become
one script: sorted by their imports, without ``import`` and ``export``, in one function scope.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mlx_gpt.lens.diagram.svg import STYLE

FOLDER = Path(__file__).parent
IMPORT = re.compile(r'^import \{[^}]*\} from "([^"]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?function|const|let|class)", re.MULTILINE)
NAME = re.compile(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", re.MULTILINE)


def join_page(data: dict[str, Any], title: str) -> str:
    """Return the HTML of a page with this data, ``JSON``-like, and title; its style has the diagram's.

    The content security policy allows this script and this style by their hashes, and nothing else: no network, no
    ``eval``, no inline handlers.
    """
    script = f'(function () {{\n"use strict";\n{join_modules(FOLDER / "js" / "main.js")}\n}})();'
    style = f"{(FOLDER / 'style.css').read_text(encoding='utf-8')}\n{STYLE}"
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        policy=f"default-src 'none'; img-src data:; script-src {source(script)}; style-src {source(style)}",
        style=style,
        data=json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
    )


def source(content: str) -> str:
    """Return the policy's expression for inline content: its SHA-256."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def join_modules(main: Path) -> str:
    """Return a module and all that it imports as one text, each after those it imports.

    Raises ``ValueError`` for modules that import each other and for a name that two modules give.
    """
    modules: dict[Path, str] = {}
    collect(main.resolve(), modules, ())
    owners: dict[str, str] = {}
    for file, text in modules.items():
        for name in NAME.findall(text):
            if owners.setdefault(name, file.name) != file.name:
                raise ValueError(f"{name} is in {owners[name]} and in {file.name}; rename one")
    return "\n".join(EXPORT.sub("", IMPORT.sub("", text)) for text in modules.values()).replace(
        "</script", "<\\/script"
    )


def collect(file: Path, modules: dict[Path, str], above: tuple[Path, ...]) -> None:
    """Add a module to ``modules`` after those that it imports."""
    if file in above:
        raise ValueError(f"modules import each other: {' > '.join(path.name for path in [*above, file])}")
    if file in modules:
        return
    text = file.read_text(encoding="utf-8")
    for path in IMPORT.findall(text):
        collect((file.parent / path).resolve(), modules, (*above, file))
    modules[file] = f"// {file.name}\n{text}"
