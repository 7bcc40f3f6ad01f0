"""The bundler: modules become one script, and the page's policy allows nothing but that."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from mlx_gpt.lens.page.bundle import FOLDER, join_modules, join_page

MODULES = sorted((FOLDER / "js").rglob("*.js"))


def write(folder: Path, **modules: str) -> Path:
    for name, text in modules.items():
        (folder / f"{name}.js").write_text(text, encoding="utf-8")
    return folder / "main.js"


def test_a_module_stands_after_those_it_imports(tmp_path: Path) -> None:
    a = 'import { b, c } from "./b.js";\nexport const a = b;\n'
    main = write(tmp_path, main='import { a } from "./a.js";\na();\n', a=a, b="export function b() {}\n")
    lines = [line for line in join_modules(main).splitlines() if line and not line.startswith("//")]
    assert lines == ["function b() {}", "const a = b;", "a();"]


def test_modules_that_import_each_other_are_refused(tmp_path: Path) -> None:
    main = write(tmp_path, main='import { a } from "./a.js";\n', a='import { b } from "./main.js";\n')
    with pytest.raises(ValueError, match=r"main\.js > a\.js > main\.js"):
        join_modules(main)


def test_one_name_in_two_modules_is_refused(tmp_path: Path) -> None:
    main = write(tmp_path, main='import { a } from "./a.js";\nconst x = 1;\n', a="function x() {}\n")
    with pytest.raises(ValueError, match=r"x is in a\.js and in main\.js"):
        join_modules(main)


def test_the_policy_allows_this_script_and_this_style_only() -> None:
    page = join_page({"text": "</script><script>alert(1)</script>"}, "<b>name</b>")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.count("</script>") == 2  # of the data and of the script
    assert "<title>&lt;b&gt;name&lt;/b&gt;</title>" in page


@pytest.mark.parametrize("module", MODULES, ids=lambda file: file.name)
def test_no_module_evaluates_text_or_writes_html(module: Path) -> None:
    forbidden = r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\bimport\(|\bon\w+=\""
    assert not re.search(forbidden, module.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES, ids=lambda file: file.name)
def test_no_module_needs_a_network(module: Path) -> None:
    text = module.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", text)
