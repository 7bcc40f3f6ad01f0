"""Chromium for tests of the lens's page: a session's browser, and pages that must not report anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ON_A_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium: playwright's own, that of CHROMIUM in the environment, or the system's; else skip."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
    with playwright.sync_playwright() as engines:
        executable = chromium_at(engines.chromium.executable_path)
        if executable is None:
            pytest.skip("needs Chromium: install it, or run python -m playwright install chromium")
        started = engines.chromium.launch(executable_path=executable, args=[*QUIET])
        yield started
        started.close()


def chromium_at(own: str) -> str | None:
    """Return the path of Chromium, None without one; ``own`` is where playwright installs its own."""
    found = (os.environ.get("CHROMIUM"), own, *map(shutil.which, NAMES), ON_A_MAC)
    return next((str(path) for path in found if path and Path(path).exists()), None)


@contextmanager
def open_page(browser: Any, file: Path, link: str = "", **context: Any) -> Iterator[Any]:
    """Open a file offline. The page must report no error, break its policy nowhere and ask for no URL.

    In it ``wait_for_function`` takes a function, "() => ..."; an expression would be evaluated, against the policy.
    ``link`` is what follows the file's address, such as ``#...``; ``context`` are settings of a new browser context:
    ``viewport={"width": 360, "height": 740}``, ``color_scheme="dark"``.
    """
    address = file.resolve().as_uri()
    faults: list[str] = []
    opened = browser.new_context(offline=True, **context)
    page = opened.new_page()
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if not is_local(request.url, address) else None)
    try:
        page.goto(address + link)
        yield page
    finally:
        opened.close()
    assert not faults, faults


def is_local(url: str, address: str) -> bool:
    return url.partition("#")[0] == address or url.startswith(("data:", "blob:"))
