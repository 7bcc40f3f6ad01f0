"""Activations, edits and readings equal those of TransformerLens 2 and 3 (``pip install 'transformer-lens<4'``)."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.lens_model import B, T, V, random_ids, random_model

from mlx_gpt import lens
from mlx_gpt.check.published_lens import losses_without_values
from mlx_gpt.config import GPTConfig
from mlx_gpt.model.gpt import GPT
from mlx_gpt.store.folder import save
from mlx_gpt.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformer_lens = pytest.importorskip("transformer_lens")
if int(version("transformer-lens").split(".")[0]) > 3:
    pytest.skip("TransformerLens 4 has no HookedTransformer", allow_module_level=True)

pytestmark = pytest.mark.parity
MODEL, CLEAN, CORRUPTED = random_model(), random_ids(0), random_ids(1)
CORRECT, WRONG = [3, 4], [5, 6]


def hooked(model: GPT, **processing: bool) -> Any:
    """Return the model in TransformerLens, with its weights as they are unless ``fold_ln``."""
    settings = model.config
    L, H, C, V = settings.n_layer, settings.n_head, settings.n_embd, settings.vocab_size
    D, P = C // H, settings.n_positions
    config = transformer_lens.HookedTransformerConfig(
        n_layers=L, d_model=C, n_ctx=P, d_head=D, n_heads=H, d_vocab=V, act_fn="gelu_new", normalization_type="LN"
    )
    weights = {
        "embed.W_E": model.wte.weight,
        "pos_embed.W_pos": model.wpe.weight,
        "unembed.W_U": model.wte.weight.T,
        "unembed.b_U": mx.zeros((V,)),
        "ln_final.w": model.ln_f.weight,
        "ln_final.b": model.ln_f.bias,
    }
    for layer, block in enumerate(model.h):
        qkv = zip(
            "QKV", block.attn.c_attn.weight.reshape(3, H, D, C), block.attn.c_attn.bias.reshape(3, H, D), strict=True
        )
        of_block = {f"attn.W_{name}": weight.swapaxes(1, 2) for name, weight, _ in qkv}
        of_block |= dict(
            zip(["attn.b_Q", "attn.b_K", "attn.b_V"], block.attn.c_attn.bias.reshape(3, H, D), strict=True)
        )
        of_block |= {"attn.W_O": block.attn.c_proj.weight.T.reshape(H, D, C), "attn.b_O": block.attn.c_proj.bias}
        of_block |= {"ln1.w": block.ln_1.weight, "ln1.b": block.ln_1.bias}
        of_block |= {"ln2.w": block.ln_2.weight, "ln2.b": block.ln_2.bias}
        of_block |= {"mlp.W_in": block.mlp.c_fc.weight.T, "mlp.b_in": block.mlp.c_fc.bias}
        of_block |= {"mlp.W_out": block.mlp.c_proj.weight.T, "mlp.b_out": block.mlp.c_proj.bias}
        weights |= {f"blocks.{layer}.{name}": array for name, array in of_block.items()}
    theirs = transformer_lens.HookedTransformer(config)
    state = theirs.state_dict() | {name: torch.tensor(np.array(array)) for name, array in weights.items()}
    off = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    theirs.load_and_process_state_dict(state, **({"fold_ln": False} | off | processing))
    theirs.set_use_attn_result(True)
    return theirs.eval()


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(tokens: mx.array) -> Any:
    return torch.tensor(np.array(tokens)).long()


def agree(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", ["small", pytest.param("124M", marks=pytest.mark.slow)])
def test_all_activations_agree(size: str) -> None:
    mx.random.seed(0)
    model = MODEL if size == "small" else GPT(GPTConfig())
    _, theirs = hooked(model).run_with_cache(ids(CLEAN))
    _, ours = lens.trace(model, CLEAN, names=[*theirs, "*ln1.hook_out", "*ln2.hook_out", "ln_final.hook_out"])
    assert set(lens.activation_names(model.config)) <= set(theirs)
    before_the_weight = not version("transformer-lens").startswith("2.")
    for name in theirs:
        ln_out = name.endswith("hook_normalized") and not before_the_weight
        agree(ours[name.replace("hook_normalized", "hook_out") if ln_out else name], theirs[name])


@pytest.mark.skipif(version("transformer-lens").startswith("2."), reason="TransformerLens 2 has no bridge")
def test_all_activations_of_the_bridge_agree_by_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from transformer_lens.model_bridge import TransformerBridge

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, folder = random_model(vocab_size=257), str(tmp_path / "model")
    save(model, Tokenizer.bytes(), folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(folder, hf_model=theirs, tokenizer=tokenizer)
    _, expected = bridge.run_with_cache(ids(CLEAN))
    names = [name for name in expected if name not in ("embed.hook_in", "pos_embed.hook_in")]  # ids
    _, ours = lens.trace(model, CLEAN, names=names)
    assert len(names) > 100
    for name in names:
        masked = expected[name] < -1e38  # float32's lowest number, ours -inf
        agree(ours[name], expected[name].masked_fill(masked, -torch.inf))


EDITED = ["hook_pos_embed", "blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_mid"]
EDITED += ["blocks.0.mlp.hook_pre", "blocks.1.attn.hook_z", "blocks.2.ln1.hook_scale", "blocks.1.attn.hook_result"]


@pytest.mark.parametrize("name", EDITED)
def test_edited_logits_agree(name: str) -> None:
    ours, _ = lens.trace(MODEL, CLEAN, {name: lambda x, name: x * 0.5})
    agree(ours, hooked(MODEL).run_with_hooks(ids(CLEAN), fwd_hooks=[(name, lambda x, hook: x * 0.5)]))


def test_losses_without_a_heads_values_agree_before_and_after_processing() -> None:
    def without_head(v: Any, hook: Any) -> Any:
        v[:, :, 2] = 0
        return v

    (row,) = CLEAN[:1].tolist()
    tokenizer: Any = SimpleNamespace(start_id=row[0], encode=lambda text: row[1:])
    ours = losses_without_values(MODEL, tokenizer, {"prompt": "", "layer": 1, "head": 2})
    plain, processed = hooked(MODEL), hooked(MODEL, fold_ln=True, fold_value_biases=True, center_writing_weights=True)
    hook = [("blocks.1.attn.hook_v", without_head)]
    theirs = [m.run_with_hooks(ids(CLEAN[:1]), return_type="loss", fwd_hooks=hook) for m in (plain, processed)]
    agree(ours, torch.stack([plain(ids(CLEAN[:1]), return_type="loss"), *theirs]))


def test_attribution_agrees_with_folded_norms() -> None:
    _, theirs = hooked(MODEL, fold_ln=True).run_with_cache(ids(CLEAN))
    _, ours = lens.trace(MODEL, CLEAN)
    direction = lens.logit_direction(MODEL, CORRECT, WRONG)
    for by, stack in (("layer", "decompose_resid"), ("head", "stack_head_results"), ("neuron", "stack_neuron_results")):
        values, labels = lens.logit_attribution(MODEL, ours, direction, by)
        only = {"layer": "embed pos_embed _out", "head": "H", "neuron": "N"}[by].split()
        mine = [row[:, -1] for row, label in zip(values, labels, strict=True) if any(part in label for part in only)]
        parts = getattr(theirs, stack)(-1, pos_slice=-1)
        expected = theirs.logit_attrs(parts, torch.tensor(CORRECT), incorrect_tokens=torch.tensor(WRONG), pos_slice=-1)
        agree(mx.stack(mine), expected)


def test_circuits_and_composition_agree() -> None:
    theirs = hooked(MODEL)
    for kind in "QKV":
        agree(lens.composition_scores(MODEL, kind), theirs.all_composition_scores(kind))
    for ours, matrix in ((lens.qk_circuit, theirs.blocks[1].attn.QK), (lens.ov_circuit, theirs.blocks[1].attn.OV)):
        agree(ours(MODEL, 1, 2).product, matrix[2].AB)
        agree(ours(MODEL, 1, 2).svd()[1], matrix[2].S)
    folded = hooked(MODEL, fold_ln=True)
    agree(lens.qk_circuit(MODEL, 1, 2, fold_norm=True).product, folded.blocks[1].attn.QK[2].AB)


@pytest.mark.parametrize(
    ("name", "over", "function"),
    [
        ("hook_resid_pre", "position", "get_act_patch_resid_pre"),
        ("hook_mlp_out", "position", "get_act_patch_mlp_out"),
        ("attn.hook_z", "head", "get_act_patch_attn_head_out_all_pos"),
        ("attn.hook_pattern", "head", "get_act_patch_attn_head_pattern_all_pos"),
    ],
)
def test_activation_patching_agrees(name: str, over: str, function: str) -> None:
    from transformer_lens import patching

    theirs = hooked(MODEL)
    _, clean = theirs.run_with_cache(ids(CLEAN))

    def metric(logits: Any) -> Any:
        rows = torch.arange(B)
        return (logits[rows, -1, CORRECT] - logits[rows, -1, WRONG]).mean()

    expected = getattr(patching, function)(theirs, ids(CORRUPTED), clean, metric)
    ours = lens.activation_patching(MODEL, CLEAN, CORRUPTED, lens.logit_difference(CORRECT, WRONG), name, (over,))
    agree(ours, expected)


@pytest.mark.parametrize("kind", ["previous token", "duplicate token", "induction"])
def test_detected_heads_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.head_detector import detect_head

    tokens, theirs = lens.repeated_tokens(V, T // 2, 1), hooked(MODEL)
    monkeypatch.setattr(theirs, "to_tokens", lambda text: ids(tokens))
    expected = detect_head(theirs, "", f"{kind.replace(' ', '_')}_head", exclude_bos=True, exclude_current_token=True)
    agree(lens.detect_heads(MODEL, tokens, kind, exclude_first=True, exclude_current=True), expected)
