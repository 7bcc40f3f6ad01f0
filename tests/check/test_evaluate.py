"""``mlx-gpt eval``: its metrics equal those of a plain loop, of transformers and of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from helpers.command_line import the_line
from helpers.loopback_hub import NOWHERE, Hub, connect, running
from mlx import nn

from mlx_gpt.check.evaluate import TASKS, evaluate, published
from mlx_gpt.check.hellaswag import clean
from mlx_gpt.check.perplexity import perplexity, windows
from mlx_gpt.check.task import Evaluation, Task
from mlx_gpt.cli import main
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import load, save
from mlx_gpt.text.tokenizer import Tokenizer
from mlx_gpt.tinyworld import stories as tinyworld
from mlx_gpt.train.loss import mean_loss


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, trained until it prefers some words, and a data file for each task."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = Tokenizer.train(tinyworld.generate_stories(200, seed=0), 400)
    mx.random.seed(0)
    model = GPT(GPTConfig(vocab_size=400, n_positions=64, n_embd=64, n_layer=2, n_head=2))
    optimizer = optim.AdamW(3e-3)
    value_and_grad = nn.value_and_grad(model, lambda x, y: mean_loss(model(x), y))
    ids = np.array(tokenizer.encode("\n".join(tinyworld.generate_stories(400, seed=0))))
    rng = np.random.default_rng(0)
    for _ in range(120):
        starts = rng.integers(0, len(ids) - 65, 8)
        batch = mx.array(np.stack([ids[i : i + 65] for i in starts]).astype(np.int32))
        _, gradient = value_and_grad(batch[:, :-1], batch[:, 1:])
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
    save(model, tokenizer, folder / "model")
    stories = tinyworld.generate_stories(60, seed=1)
    (folder / "text.txt").write_text("\n".join(stories))
    passages = [" ".join(one.split()[: 8 + 3 * (i % 25)]) for i, one in enumerate(stories)]
    passages += ["Lily", "Lily  went", "two words \n\nEmma"]  # no context, spaces
    passages += [stories[0] + " " + stories[1]]  # too long
    write(folder / "lambada.jsonl", [{"text": one} for one in passages])
    write(folder / "hellaswag.jsonl", [as_question(one, i) for i, one in enumerate(stories)])
    return folder


def write(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_question(story: str, i: int) -> dict[str, Any]:
    words = story.split()
    ctx_a, ctx_b, end = " ".join(words[:12]), " ".join(words[12:16]).lower(), " ".join(words[16:24])
    tags = ["[header] ", " ", "  x [title] "]
    wrong = [tag + " ".join(words[at : at + 6 + at // 8]) for tag, at in zip(tags, (20, 25, 32), strict=True)]
    endings = [*wrong[: i % 4], end, *wrong[i % 4 :]]
    return {"activity_label": "Story [title]", "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings, "label": str(i % 4)}


def rows(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def metrics(trained: Path, task: str, **settings: Any) -> dict[str, float]:
    model, tokenizer = load(trained / "model")
    data = trained / ("text.txt" if task == "perplexity" else f"{task}.jsonl")
    return {name: one["value"] for name, one in evaluate(model, tokenizer, task, data, **settings)["figures"].items()}


# By the definition, one text at a time ------------------------------------------------------------------------------


class Plain:
    """One text, one forward pass: ids (n,) -> logprobs (n, V)."""

    def __init__(self, trained: Path):
        self.model, self.tokenizer = load(trained / "model")

    def __call__(self, ids: list[int]) -> np.ndarray:
        logits = np.array(self.model([ids])[0], np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


class Torch(Plain):
    """The same in transformers."""

    def __init__(self, trained: Path):
        super().__init__(trained)
        _, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        self.peer = transformers.GPT2LMHeadModel.from_pretrained(trained / "model").eval()

    def __call__(self, ids: list[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            return torch.log_softmax(self.peer(torch.tensor([ids])).logits[0].double(), -1).numpy()


BOTH = pytest.mark.parametrize("peer", [Plain, pytest.param(Torch, marks=pytest.mark.parity)])


def score_one(of: Plain, context: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the logprob of each token of the continuation and whether it is greedy, as the harness defines them."""
    stripped = context.rstrip()
    context, text = stripped, context[len(stripped) :] + text
    before = of.tokenizer.encode(context)
    ids = of.tokenizer.encode(context + text)[len(before) :] if context else of.tokenizer.encode(text)
    everything = ((before or [of.tokenizer.eot_id]) + ids)[-65:]
    logprobs = of(everything[:-1])[-len(ids) :]
    return logprobs[np.arange(len(ids)), ids], logprobs.argmax(-1) == ids


@BOTH
def test_lambada_equals_a_loop_over_the_passages(peer: type[Plain], trained: Path) -> None:
    of, found = peer(trained), []
    for row in rows(trained / "lambada.jsonl"):
        words = row["text"].split(" ")
        found.append(score_one(of, " ".join(words[:-1]), " " + words[-1]))
    expected = {
        "acc": np.mean([greedy.all() for _, greedy in found]),
        "perplexity": np.exp(-np.mean([logprobs.sum() for logprobs, _ in found])),
        "acc_last_token": np.mean([greedy[-1] for _, greedy in found]),
        "perplexity_last_token": np.exp(-np.mean([logprobs[-1] for logprobs, _ in found])),
    }
    assert 0.1 < expected["acc"] < expected["acc_last_token"] < 0.9, (
        "the model or the passages cannot tell right from wrong"
    )
    assert metrics(trained, "lambada") == pytest.approx(expected, rel=1e-4)


@BOTH
def test_hellaswag_equals_a_loop_over_the_endings(peer: type[Plain], trained: Path) -> None:
    of, right, right_by_character = peer(trained), [], []
    for row in rows(trained / "hellaswag.jsonl"):
        context = clean("Story [title]: " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
        endings = [clean(one) for one in row["endings"]]
        sums = np.array([score_one(of, context, " " + one)[0].sum() for one in endings])
        right.append(sums.argmax() == int(row["label"]))
        right_by_character.append((sums / [len(one) for one in endings]).argmax() == int(row["label"]))
    expected = {"acc": np.mean(right), "acc_norm": np.mean(right_by_character)}
    assert expected["acc"] != expected["acc_norm"], "the questions cannot distinguish the two metrics"
    assert metrics(trained, "hellaswag") == pytest.approx(expected)


@BOTH
@pytest.mark.parametrize("stride", [64, 32, 7])
def test_perplexity_scores_each_token_after_the_tokens_before_it_in_its_window(
    stride: int, peer: type[Plain], trained: Path, tmp_path: Path
) -> None:
    of = peer(trained)
    ids = of.tokenizer.encode((trained / "text.txt").read_text()[:4000])
    total, n, n_bytes, done = 0.0, 0, 0, 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + 64]
        logprobs = of(window[:-1])
        for position in range(max(done, begin + 1), begin + len(window)):
            total -= logprobs[position - begin - 1, ids[position]]
            n, n_bytes = n + 1, n_bytes + len(of.tokenizer.token_bytes(ids[position]))
        done = begin + len(window)
        if done == len(ids):
            break
    (tmp_path / "text.txt").write_text((trained / "text.txt").read_text()[:4000])
    result = perplexity(of.model, of.tokenizer, tmp_path / "text.txt", stride=stride)
    assert result.n == n
    assert result.metrics["perplexity"][0] == pytest.approx(np.exp(total / n), rel=1e-4)
    assert result.metrics["bits_per_byte"][0] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-4)


EMPTY_RECORDS = {
    "a.jsonl": '{"text": null}\n{"text": "Lily went"}\n{"text": ""}\n{"text": "\\ufeff"}\n{"text": "to the park"}\n',
    "a.json": '["", "Lily went", "", "", "to the park"]',
    "columns.json": '{"text": ["Lily went", null, null, null, "to the park"]}',
    "a.csv": 'text,id\n,1\nLily went,2\n,3\n"",4\nto the park,5\n',
}


@pytest.mark.parametrize("name", EMPTY_RECORDS)
def test_empty_records_are_left_out_and_reported(name: str, trained: Path, tmp_path: Path) -> None:
    model, tokenizer = load(trained / "model")
    (tmp_path / name).write_text(EMPTY_RECORDS[name])
    (tmp_path / "without.json").write_text('["Lily went", "to the park"]')
    found, without = (perplexity(model, tokenizer, tmp_path / file) for file in (name, "without.json"))
    assert (found.n, found.metrics) == (without.n, without.metrics)
    assert f"3 empty documents were left out ({name})" in found.changes


def test_the_public_data_set_keeps_its_empty_rows_as_the_recipe_does(trained: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    model, tokenizer = load(trained / "model")
    texts = ["", " = Lily = \n", "", "Lily went"]
    file = tmp_path / TASKS["perplexity"].file
    file.parent.mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), file)
    (tmp_path / "recipe.txt").write_text("\n\n".join(texts))
    found, recipe = (perplexity(model, tokenizer, each) for each in (file, tmp_path / "recipe.txt"))
    assert (found.n, found.metrics) == (recipe.n, recipe.metrics)


@pytest.mark.parity
@pytest.mark.parametrize("stride", [64, 32])
def test_perplexity_equals_the_recipe_in_the_documentation_of_transformers(
    stride: int, trained: Path, tmp_path: Path
) -> None:
    torch, of = pytest.importorskip("torch"), Torch(trained)
    text = (trained / "text.txt").read_text()[:-10]  # a single remaining token gives NaN in the recipe
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor([of.tokenizer.encode(text)])
    total, n, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        new_end = min(begin + 64, ids.shape[1])
        targets = ids[:, begin:new_end].clone()
        targets[:, : end - new_end] = -100
        with torch.no_grad():
            mean = of.peer(ids[:, begin:new_end], labels=targets).loss.item()
        counted = int((targets != -100).sum()) - 1  # the recipe's own count
        total, n, end = total + mean * counted, n + counted, new_end
        if end == ids.shape[1]:
            break
    found = perplexity(of.model, of.tokenizer, tmp_path / "text.txt", stride=stride).metrics["perplexity"][0]
    print(f"stride {stride}: recipe {math.exp(total / n):.7g}, here {found:.7g}")
    assert found == pytest.approx(math.exp(total / n), rel=1e-3)


def test_every_token_with_a_context_is_scored_once() -> None:
    for n, stride in ((2, 3), (8, 3), (9, 8), (100, 1), (101, 7)):
        scored = [i for one in windows(list(range(n)), 8, stride) for i in one.ids[one.first :]]
        unscored = {0, *range(0, n, 8)} if stride == 8 else {0}
        assert scored == [i for i in range(n) if i not in unscored]


# lm-evaluation-harness itself -------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.slow
def test_metrics_equal_those_of_lm_evaluation_harness(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = Path(lm_eval.__file__).parent / "tasks"
    for task, include, split in (("lambada", "lambada_openai", "test"), ("hellaswag", "hellaswag", "validation")):
        local = {"data_files": {split: str(trained / f"{task}.jsonl")}}
        (tmp_path / f"{task}.yaml").write_text(
            f"include: {source / task / include}.yaml\ntask: mine_{task}\ntag: null\n"
            f"dataset_path: json\ndataset_name: null\ntraining_split: null\ndataset_kwargs: {json.dumps(local)}\n"
        )
    peer = HFLM(pretrained=str(trained / "model"), device="cpu", batch_size=8, dtype="float32")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["mine_lambada", "mine_hellaswag"]
    results = lm_eval.simple_evaluate(peer, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    for task, metric in [
        ("lambada", "acc"),
        ("lambada", "perplexity"),
        ("hellaswag", "acc"),
        ("hellaswag", "acc_norm"),
    ]:
        theirs, ours = results[f"mine_{task}"][f"{metric},none"], metrics(trained, task)[metric]
        print(f"{task} {metric}: harness {theirs:.7g}, here {ours:.7g}")
        assert ours == pytest.approx(theirs, rel=1e-3), f"{task} {metric}"


# The command ------------------------------------------------------------------------------------------------------


def test_the_json_holds_every_setting_and_the_standard_errors(trained: Path, capsys: Any) -> None:
    text = str(trained / "text.txt")
    assert (
        main(["eval", str(trained / "model"), "--task", "perplexity", "--data", text, "--stride", "16", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["settings"] == {"n_positions": 64, "dtype": "mlx.core.float32", "stride": 16}
    assert result["data"] == text
    assert result["n"] == len(load(trained / "model")[1].encode((trained / "text.txt").read_text())) - 1
    assert all(0 < one["stderr"] < one["value"] for one in result["figures"].values())
    assert result["published"] == []


def test_published_metrics_are_given_for_known_models_only(tmp_path: Path) -> None:
    metrics = published("lambada", "openai-community/gpt2", tmp_path, 124439808)
    assert {one["what"]: one["value"] for one in metrics}["perplexity_last_token"] == 35.13
    assert all(one["source"] for one in metrics)
    assert published("lambada", "openai-community/gpt2", tmp_path, 1) == []
    assert published("lambada", "mine", tmp_path, 124439808) == []


GOOD = {"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": 1}
WRONG = [
    ("perplexity", "", "expected a text, found an empty file"),
    ("perplexity", "L", "expected at least 2 tokens, of which the second is scored, found 1"),
    ("perplexity", b"\xff\xfe", "expected a text, found an empty file"),
    ("perplexity", b"\xff" * 99, "expected UTF-8 text"),
    ("lambada", "", "expected a JSON object a line, found none"),
    ("lambada", '{"text": "a b"}\n{"text": "a', "line 2: expected a JSON object"),
    ("lambada", '{"text": "a b"}\n\n[1]\n', "line 3: expected a JSON object"),
    ("lambada", '{"txt": "a b"}\n', "line 1: expected a text in the field 'text', found only txt"),
    ("lambada", '{"text": 5}\n', "line 1: expected a text in the field 'text', found 5"),
    ("lambada", '{"text": "a b "}\n', "line 1: expected a passage that ends with a word"),
    ("lambada", json.dumps({"text": "a " + "xqz" * 100}), "line 1: expected 1 to 64 tokens to score"),
    ("hellaswag", json.dumps({**GOOD, "label": 2}), "line 1: expected a 'label' from 0 to 1, found 2"),
    ("hellaswag", json.dumps({**GOOD, "label": ""}), "line 1: expected a 'label' from 0 to 1, found ''"),
    ("hellaswag", json.dumps({**GOOD, "endings": "de"}), "line 1: expected a list of texts in the field 'endings'"),
    ("hellaswag", json.dumps({**GOOD, "endings": ["d", "[e]"]}), "line 1: expected endings with text outside brackets"),
    ("hellaswag", '{"ctx_a": "b"}', "line 1: expected a text in the field 'activity_label', found only ctx_a"),
]


@pytest.mark.parametrize(("task", "content", "message"), WRONG)
def test_bad_data_is_reported_in_one_line(
    task: str, content: str | bytes, message: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "data").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["eval", str(trained / "model"), "--task", task, "--data", str(tmp_path / "data")]) == 1
    output = capsys.readouterr()
    assert message in the_line(output.err.strip())
    assert not output.out


def test_a_new_task_is_one_entry_in_the_table(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def measure(model: Any, tokenizer: Any, data: Path, on_scored: Any, stride: int = 1) -> Evaluation:
        return Evaluation({"length": (float(len(data.read_text()) * stride), None)}, n=1)

    monkeypatch.setitem(TASKS, "length", Task("mine/length", "text", measure, ("stride",)))
    (tmp_path / "data").write_text("five!")
    result = evaluate(*load(trained / "model"), "length", tmp_path / "data", stride=2)
    assert result["figures"] == {"length": {"value": 10.0, "stderr": None}}


def test_the_help_names_every_task(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    assert all(name in out for out in [capsys.readouterr().out] for name in TASKS)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--task perplexity --data text.txt --stride 0", 2, "--stride must be between 1 and 64, the model's context"),
        ("--task perplexity --data text.txt --stride 65", 2, "--stride must be between 1 and 64, the model's context"),
        ("--task lambada --data lambada.jsonl --stride 8", 2, "--stride is a setting of perplexity, not of lambada"),
        ("--task arc --data text.txt", 2, "--task must be one of perplexity, lambada, hellaswag, not 'arc'"),
        ("--task lambada --data nothing.jsonl", 1, "nothing.jsonl: expected a file, found none"),
    ],
)
def test_wrong_flags_are_reported_in_one_line(
    flags: str, code: int, message: str, trained: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(trained)
    assert main(["eval", "model", *flags.split()]) == code
    assert message in the_line(capsys.readouterr().err.strip())


def test_a_missing_folder_is_reported_in_one_line(trained: Path, capsys: Any) -> None:
    assert main(["eval", "./no-model", "--task", "lambada", "--data", str(trained / "lambada.jsonl")]) == 1
    assert "no such folder" in the_line(capsys.readouterr().err)


# The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(trained: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub that has only LAMBADA."""
    repository, name = TASKS["lambada"].repository, TASKS["lambada"].file
    (tmp_path / "hub" / name).parent.mkdir(parents=True)
    (tmp_path / "hub" / name).write_bytes((trained / "lambada.jsonl").read_bytes())
    with running() as hub:
        hub.add(f"datasets/{repository}", tmp_path / "hub")
        yield hub


def test_without_data_the_public_data_set_is_fetched_once(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def run(task: str, endpoint: str) -> Any:
        connect(endpoint, tmp_path / "cache", monkeypatch)
        return main(["eval", str(trained / "model"), "--task", task, "--json"]), *capsys.readouterr()

    code, out, err = run("lambada", hub.address)
    assert code == 0, err
    result = json.loads(out)
    assert result["data"] == "EleutherAI/lambada_openai/data/lambada_test_en.jsonl"
    assert {name: one["value"] for name, one in result["figures"].items()} == pytest.approx(metrics(trained, "lambada"))
    _, again, _ = run("lambada", NOWHERE)
    assert json.loads(again)["figures"] == result["figures"]
    (code, _, missing), (code_offline, _, unreachable) = run("hellaswag", hub.address), run("hellaswag", NOWHERE)
    assert "Rowan/hellaswag: no such dataset on the hub" in the_line(missing)
    assert "Rowan/hellaswag: it is not in the cache, and http" in the_line(unreachable)
    assert "or give --data FILE" in unreachable
    assert code == code_offline == 1
