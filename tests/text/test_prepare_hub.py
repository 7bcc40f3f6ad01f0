"""Named corpora on the hub: the real client against a server on loopback, with small synthetic files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.command_line import the_line
from helpers.loopback_hub import NOWHERE, Hub, connect, running

from mlx_gpt.cli import main
from mlx_gpt.text.prepare import open_prepared
from mlx_gpt.text.token_settings import EOT
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.windows import TokenStream
from mlx_gpt.tinyworld import stories as tinyworld

STORIES = tinyworld.generate_stories(60, seed=3)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with TinyStories: a text file with <|endoftext|> between the stories."""
    repository, file = "roneneldan/TinyStories", "TinyStoriesV2-GPT4-train.txt"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / file).write_text(f"\n{EOT}\n".join(STORIES))
    with running() as hub:
        hub.add(f"datasets/{repository}", tmp_path / "hub")
        yield hub


Prepare = Callable[..., tuple[int, str]]


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Run ``mlx-gpt prepare`` on a corpus, with the hub at an endpoint; return the exit code and stderr."""

    def of(name: str, endpoint: str, out: str = "out") -> tuple[int, str]:
        connect(endpoint, tmp_path / "cache", monkeypatch)
        code = main(["prepare", name, "--tokenizer", "bytes", "--out", str(tmp_path / out)])
        return code, capsys.readouterr().err

    return of


def documents(folder: Path) -> list[str]:
    done = open_prepared(folder)

    def of(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
        pairs = zip(stream.starts[:-1], stream.starts[1:], strict=True)
        return [tokenizer.decode(stream.ids[start + 1 : end].tolist()) for start, end in pairs]

    return of(done.train, done.tokenizer) + of(done.val, done.tokenizer)


def test_tinystories_is_fetched_once_and_its_stories_are_documents(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    code, stderr = prepare("tinystories", hub.address)
    assert code == 0, stderr
    assert hub.served() == ["TinyStoriesV2-GPT4-train.txt"]
    found = documents(tmp_path / "out")
    assert len(found) in (60, 61)  # one of them may be cut for validation
    assert "".join(found).replace("\n", "") == "".join(STORIES).replace("\n", "")
    code, stderr = prepare("tinystories", NOWHERE, out="again")  # from the client's cache
    assert code == 0, stderr
    assert documents(tmp_path / "again") == found


def test_fineweb_edu_is_read_from_parquet(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    repository, file = "HuggingFaceFW/fineweb-edu", "sample/10BT/000_00000.parquet"
    (tmp_path / "web" / file).parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": STORIES, "score": [3.0] * len(STORIES)}), tmp_path / "web" / file)
    hub.add(f"datasets/{repository}", tmp_path / "web")
    code, stderr = prepare("fineweb-edu", hub.address)
    assert code == 0, stderr
    assert sorted(documents(tmp_path / "out")) == sorted(STORIES)


def test_a_failed_download_is_one_line_and_leaves_nothing(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    lines = {}
    for case, name, endpoint in (("missing", "fineweb-edu", hub.address), ("unreachable", "tinystories", NOWHERE)):
        code, stderr = prepare(name, endpoint)
        assert code == 1
        lines[case] = the_line(stderr)
        assert not (tmp_path / "out").exists()
    assert lines["missing"].startswith("HuggingFaceFW/fineweb-edu: no such dataset on the hub")
    assert lines["missing"].endswith("; or download sample/10BT/000_00000.parquet by hand and give its path")
    assert lines["unreachable"].startswith("roneneldan/TinyStories: it is not in the cache, and http")
