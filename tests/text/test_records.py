"""Records of JSON, tables and Arrow files are read whole or refused with their place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mlx_gpt.errors import DataError
from mlx_gpt.text import json_records as json_module
from mlx_gpt.text.decoding import Changes
from mlx_gpt.text.json_records import json_records

LONG_LINES = [
    {"text": "plain " * 20},
    {"id": 7, "meta": {"a": [1, -2.5e-3, {}, [], [[]], None, True], "text": "no"}, "text": "the one", "z": "}]"},
    {
        "texts": "no",
        "te": "no",
        "": "",
        "x" * 200: ["\ud83d\ude00" * 90],
        "text": 'quotes " \\ \\" and / \b\f\n\r\t \u2028',
    },
    {"text": "🙂漢é\0" * 60},
    {"text": "half a pair \ud83d and \ude00, turned \ude00\ud83d" * 5},
    {"text": "\\" * 99 + '"' + "\\ud83d" * 9},
    {"text": ""},
    {"text": None},
]


@pytest.mark.parametrize("ahead", [13, 64, 1000])
@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("indent", [None, 0])
def test_a_long_line_parsed_incrementally_has_the_text_of_json_loads(
    ahead: int, escaped: bool, indent: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_module, "LONG", 16)
    monkeypatch.setattr(json_module, "AHEAD", ahead)
    lines = [json.dumps(record, indent=indent).replace("\n", " \t\r") for record in LONG_LINES]
    if not escaped:
        lines = [json.dumps(json.loads(line), ensure_ascii="half" in line) for line in lines]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = ["".join(pieces) for pieces in json_records(tmp_path / "t.jsonl", "text", Changes())]
    assert found == [json.loads(line)["text"] or "" for line in lines]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "cut short, in the middle', "(?i)invalid|unterminated"),
        ('{"text": "cut short, in an escape \\u12', "(?i)invalid|unterminated"),
        ('{"text": "and not closed, but for the string"', "expected"),
        ('{"text": "an escape that is none: \\q"}', "Invalid"),
        ('{"text": "a tab that is none:\t, as it is raw"}', "Invalid"),
        ('{"text": "more follows it in the line"} {}', "found only nothing"),
        ('{"text": "a field too many", "text": "there"}', "duplicate"),
        ('{"text": "a comma and nothing after it", }', 'expected "'),
        ('{"other": [1, 2, 3, 4, 5, ], "text": "a comma"}', "Expecting value"),
        ('{"other": tru, "text": "no word of JSON\'s"}', "Expecting value"),
        ('{"other": 1 "text": "no comma between these"}', "expected ,"),
        ('{"a long name": "and no text at all in it"}', "found only 'a long name'"),
        ('{"text": 12345678901234567890123456789}', "its text is 123456"),
        ('["text", "a list of some texts, in one line"]', "expected {|its text is"),
        ('{"other": ' + "[" * 100_000, "(?s)recursion|deep"),
    ],
)
def test_an_invalid_long_line_is_refused_like_a_short_one(
    line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b'{"text": "a"}\n' + line.encode() + b"\n"
    (tmp_path / "t.jsonl").write_bytes(data)
    for long in (1 << 21, 32):
        monkeypatch.setattr(json_module, "LONG", long)
        with pytest.raises(DataError, match=r"t.jsonl, line 2: expected") as refused:
            [list(pieces) for pieces in json_records(tmp_path / "t.jsonl", "text", Changes())]
    assert re.search(why, str(refused.value))
