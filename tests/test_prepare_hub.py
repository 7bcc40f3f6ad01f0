"""The named corpora come from the hub: the real client against a server on loopback, with small made-up files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import in_a_process, the_line
from loopback_hub import NOWHERE, Hub, running

from mlx_gpt.text import tinyworld
from mlx_gpt.text.prepare import open_prepared
from mlx_gpt.text.shards import TokenStream
from mlx_gpt.text.sources import HUB
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.text.vocab_files import EOT

STORIES = tinyworld.stories(60, seed=3)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that has TinyStories, as it is kept there: a text file with marks between the stories."""
    repository, file = HUB["tinystories"]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / file).write_text(f"\n{EOT}\n".join(STORIES))
    with running() as hub:
        hub.add(f"datasets/{repository}", tmp_path / "hub")
        yield hub


def prepare(name: str, endpoint: str, here: Path, out: str = "out") -> subprocess.CompletedProcess[str]:
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(here / "cache"), "no_proxy": "127.0.0.1"}
    return in_a_process("prepare", name, "--tokenizer", "bytes", "--out", out, cwd=here, env=env)


def documents(folder: Path) -> list[str]:
    done = open_prepared(folder)

    def of(stream: TokenStream, tokenizer: Tokenizer) -> list[str]:
        pairs = zip(stream.starts[:-1], stream.starts[1:], strict=True)
        return [tokenizer.decode(stream.ids[start + 1 : end].tolist()) for start, end in pairs]

    return of(done.train, done.tokenizer) + of(done.val, done.tokenizer)


def test_tinystories_is_fetched_once_and_its_stories_are_documents(hub: Hub, tmp_path: Path) -> None:
    run = prepare("tinystories", hub.address, tmp_path)
    assert run.returncode == 0, run.stderr
    assert hub.fetched() == ["TinyStoriesV2-GPT4-train.txt"]
    found = documents(tmp_path / "out")
    assert len(found) in (60, 61)  # one of them may be cut for validation
    assert "".join(found).replace("\n", "") == "".join(STORIES).replace("\n", "")
    again = prepare("tinystories", NOWHERE, tmp_path, out="again")  # from the client's cache
    assert again.returncode == 0, again.stderr
    assert documents(tmp_path / "again") == found


def test_fineweb_edu_is_read_from_parquet(hub: Hub, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    repository, file = HUB["fineweb-edu"]
    (tmp_path / "web" / file).parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": STORIES, "score": [3.0] * len(STORIES)}), tmp_path / "web" / file)
    hub.add(f"datasets/{repository}", tmp_path / "web")
    run = prepare("fineweb-edu", hub.address, tmp_path)
    assert run.returncode == 0, run.stderr
    assert sorted(documents(tmp_path / "out")) == sorted(STORIES)


def test_what_the_hub_does_not_give_is_one_line_and_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    told = {}
    for case, name, endpoint in (("missing", "fineweb-edu", hub.address), ("unreachable", "tinystories", NOWHERE)):
        run = prepare(name, endpoint, tmp_path)
        assert run.returncode == 1
        told[case] = the_line(run.stderr)
        assert not (tmp_path / "out").exists()
    assert told["missing"].startswith("HuggingFaceFW/fineweb-edu: no such dataset on the hub")
    assert told["missing"].endswith("; or download sample/10BT/000_00000.parquet by hand and give its path")
    assert told["unreachable"].startswith("roneneldan/TinyStories: it is not in the cache, and http")
