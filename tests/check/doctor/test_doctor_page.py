"""The doctor's page: its table is that of the checks, and its files are examined without a fault."""

from __future__ import annotations

import pickle
import random
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mlx_gpt.check.doctor import examine
from mlx_gpt.check.doctor.build import built_arguments
from mlx_gpt.check.doctor.codes import ORDER
from mlx_gpt.check.doctor.table import PAGE, with_table


def test_the_table_is_made_from_the_docstrings_of_the_checks() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "python -m mlx_gpt.check.doctor.table makes it again"
    for code in ORDER:
        assert f"| `{code}`" in page


NANO_GPT = """
from types import ModuleType, SimpleNamespace as GPTConfig

import torch
from torch import nn


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(config.vocab_size, 32), nn.Embedding(config.block_size, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        self.h = nn.TransformerEncoder(layer, 1, nn.LayerNorm(32), enable_nested_tensor=False)
        self.lm_head = nn.Linear(32, config.vocab_size)

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.h(self.wte(idx) + self.wpe(torch.arange(T)), nn.Transformer.generate_square_subsequent_mask(T))
        return self.lm_head(x if targets is not None else x[:, [-1]]), None

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            if top_k is not None:
                logits[logits < torch.topk(logits, top_k)[0][:, [-1]]] = -torch.inf
            idx = torch.cat([idx, torch.multinomial(logits.softmax(-1), 1)], 1)
        return idx
"""  # the signatures of nanoGPT's model.py


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def some_text() -> str:
    words, rng = ["the cat", "a dog", "sees", "likes", "one bird", "and", "two fish", "."], random.Random(0)
    return " ".join(rng.choice(words) for _ in range(5000))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["mlx", "torch"])
def test_the_file_on_the_page_is_examined_without_a_fault(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    _, file, torch_model, torch_step = code_blocks()
    if library == "torch":
        start, end = file.index("class GPT"), file.index("def batches")
        file = file[:start] + torch_model + "\n\n" + torch_step + "\n\n" + file[end:]
        own = '"loss": loss, "new_step": new_step, "learning_rate": 1e-3'  # as in the sentence before
        assert own in PAGE.read_text(encoding="utf-8")
        file = file.replace("    return {\n", f"    return {{\n        {own},\n")
    (tmp_path / "my.txt").write_text(some_text())
    (tmp_path / f"{library}_gpt.py").write_text(file)
    monkeypatch.chdir(tmp_path)
    report = examine(**built_arguments(f"{library}_gpt.py:build"), minutes=0.1)
    assert report.ok, str(report)
    assert report.skipped.get("targets-not-shifted", "minutes") == "minutes"  # not for lack of an argument


@pytest.mark.slow
def test_the_file_for_nano_gpt_on_the_page_is_examined_without_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    text, data = some_text(), tmp_path / "data/shakespeare_char"
    characters = sorted(set(text))
    ids = np.array([characters.index(character) for character in text], np.uint16)
    data.mkdir(parents=True)
    (data / "input.txt").write_text(text)
    ids[:-3000].tofile(data / "train.bin")
    ids[-3000:].tofile(data / "val.bin")
    meta = {"itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    module = ModuleType("model")
    exec(NANO_GPT, vars(module))
    monkeypatch.setitem(sys.modules, "model", module)
    (tmp_path / "my_nano_gpt.py").write_text(code_blocks()[0])
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": len(characters), "block_size": 32}
    weights = module.GPT(SimpleNamespace(**sizes)).state_dict()
    (tmp_path / "out-shakespeare-char").mkdir()
    torch.save({"model_args": sizes, "model": weights}, "out-shakespeare-char/ckpt.pt")
    report = examine(**built_arguments("my_nano_gpt.py:build"), minutes=0.1)
    assert report.ok, str(report)
    assert report.skipped.get("targets-not-shifted", "minutes") == "minutes"
