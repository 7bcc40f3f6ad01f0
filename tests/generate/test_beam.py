"""Beam search: wide enough it finds the most probable text; it equals that of transformers."""

from __future__ import annotations

from itertools import product
from math import inf
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt.config import GPTConfig
from mlx_gpt.errors import UsageError
from mlx_gpt.generate.beam import beam_search
from mlx_gpt.generate.generation import LOOKUP, Generation, generate, generate_tokens
from mlx_gpt.generate.settings import GenerationSettings
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
END = TOKENIZER.eot_id
IDS = [10, 20, 30, END]  # the allowed ids
ONLY = {i: -inf for i in range(257) if i not in IDS}


def new_model(seed: int = 0) -> GPT:
    mx.random.seed(seed)
    return GPT(GPTConfig(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)).eval()


def logp(model: GPT, prompt: list[int], ids: tuple[int, ...]) -> float:
    logits = np.array(model([[*prompt, *ids]])[0]).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(sum(logs[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_with_a_beam_per_text_it_finds_the_best_text(seed: int, length_penalty: float) -> None:
    model, prompt, n = new_model(seed), [1, 2], 4
    texts = [ids for length in range(1, n) for ids in product(IDS[:3], repeat=length - 1)]
    whole = (
        [(*ids, END) for ids in texts]
        + list(product(IDS[:3], repeat=n))
        + [(*i, END) for i in product(IDS[:3], repeat=n - 1)]
    )
    best = max(set(whole), key=lambda ids: logp(model, prompt, ids) / len(ids) ** length_penalty)
    settings: dict[str, Any] = {"beams": 200, "max_tokens": n, "logit_bias": ONLY, "length_penalty": length_penalty}
    found = list(generate_tokens(model, TOKENIZER, prompt, **settings))
    assert found == [i for i in best if i != END]


def test_more_beams_find_more_probable_texts() -> None:
    better = 0
    for seed in range(8):
        model = new_model(seed)
        texts = [
            tuple(generate_tokens(model, TOKENIZER, [1], temperature=0, max_tokens=8, min_tokens=8, beams=n))
            for n in (1, 6)
        ]
        sums = [logp(model, [1], ids) for ids in texts]
        assert sums[1] >= sums[0] - 1e-6
        better += sums[1] > sums[0] + 1e-6
    assert better > 2


def test_a_beam_search_draws_nothing_and_reports_its_end() -> None:
    model = new_model()
    texts = ["".join(generate(model, TOKENIZER, "a", beams=3, seed=seed, max_tokens=9)) for seed in (1, 2)]
    assert texts[0] == texts[1]
    run = Generation(model, TOKENIZER, [[1]], GenerationSettings(beams=2, max_tokens=5, logit_bias={END: 50.0}))
    assert (list(run), run.reasons) == ([], ["end"])
    run = Generation(model, TOKENIZER, [[1]], GenerationSettings(beams=2, max_tokens=100, logit_bias={END: -inf}))
    assert (len(list(run)), run.reasons) == (32, ["context"])


def test_rules_hold_in_every_beam() -> None:
    model = new_model()
    settings: dict[str, Any] = {"beams": 4, "no_repeat_ngram": 1, "min_tokens": 20, "max_tokens": 20}
    found = list(generate_tokens(model, TOKENIZER, [1], **settings, ban=("a",), force=("ox",)))
    assert len(set(found)) == len(found) == 20
    assert " ox" in TOKENIZER.decode(found)
    assert TOKENIZER.encode("a")[0] not in found
    with pytest.raises(UsageError, match="all tokens are masked by --logit-bias;"):
        list(generate(model, TOKENIZER, "a", beams=2, logit_bias=dict.fromkeys(range(257), -inf)))


@pytest.mark.parametrize(
    ("prompts", "settings", "draft", "named"),
    [
        ([[1], [2]], {}, None, "--samples"),
        ([[1]], {}, LOOKUP, "a draft"),
        ([[1], [2]], {"logprobs": 1}, None, "--samples or --logprobs or --colour"),
    ],
    ids=["two prompts", "a draft", "probabilities"],
)
def test_incompatible_settings_are_refused_by_name(
    prompts: list[list[int]], settings: dict[str, Any], draft: Any, named: str
) -> None:
    with pytest.raises(UsageError, match=f"--beams gives the best text of one prompt, without {named}; leave out one"):
        Generation(new_model(), TOKENIZER, prompts, GenerationSettings(beams=2, **settings), draft)


@pytest.mark.parametrize("length", [3, 31, 90])
def test_a_full_context_slides(length: int) -> None:
    model, prompt = new_model(), [(7 * i) % 256 for i in range(length)]
    settings: dict[str, Any] = {"context": "slide", "temperature": 0, "max_tokens": 80, "min_tokens": 80}
    greedy = list(generate_tokens(model, TOKENIZER, prompt, **settings))
    run = Generation(model, TOKENIZER, [prompt], GenerationSettings(**settings))
    (beam,) = beam_search(run.decoder, run.sampler, run.prompts, run.read_prompt(), 80)  # of width 1
    assert beam.ids == greedy
    assert len(list(generate_tokens(model, TOKENIZER, prompt, beams=3, **settings))) == 80


SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"length_penalty": 0.0}, {"length_penalty": 0.0}),
    ({"length_penalty": 2.0}, {"length_penalty": 2.0}),
    ({"length_penalty": -1.0}, {"length_penalty": -1.0}),
    ({"repetition_penalty": 1.5, "no_repeat_ngram": 2}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    ({"min_tokens": 6}, {"min_new_tokens": 6}),
]


@pytest.mark.parity
@pytest.mark.parametrize(("ours", "theirs"), SETTINGS, ids=lambda s: str(s))
def test_it_finds_the_text_of_transformers(tmp_path: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = new_model()
    names = dict(tree_flatten(model.parameters()))
    model.wte.weight = names["wte.weight"] * mx.where(mx.arange(257) == END, 1.15, 1.0)[:, None]  # favour the end
    save(model, TOKENIZER, tmp_path)
    peer = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    lengths = set()
    for beams, prompt in product((2, 5), ([1, 2, 3], [200, 100, 50, 25])):
        out = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=beams,
            do_sample=False,
            max_new_tokens=15,
            early_stopping=False,
            pad_token_id=END,
            **theirs,
        )
        expected = [i for i in out[0, len(prompt) :].tolist() if i != END]
        found = list(generate_tokens(model, TOKENIZER, prompt, beams=beams, max_tokens=15, **ours))
        assert found == expected, f"{beams} beams after {prompt}"
        lengths.add(len(found))
    assert len(lengths) > 1 or lengths == {15}, lengths
