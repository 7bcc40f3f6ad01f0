"""Write ``fixtures/tiny-gpt2-tensorflow``: a tiny random GPT-2 saved by TensorFlow, and its values.

Run with TensorFlow installed (2.21 wrote the present files): ``python tests/helpers/make_tensorflow_fixture.py``. The
variables have the names and shapes of OpenAI's release (gpt-2, ``src/model.py``); the saver is that of TensorFlow 1.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2-tensorflow"
V, T, C, L, H = 257, 8, 8, 2, 2


def variables() -> dict[str, np.ndarray]:
    """Return the value of every variable. No bias is 0 and no norm is 1."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"wpe": (T, C), "wte": (V, C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for i in range(L):
        for name, n_in, n_out in (("attn/c_attn", C, 3 * C), ("attn/c_proj", C, C)):
            shapes |= {f"h{i}/{name}/w": (1, n_in, n_out), f"h{i}/{name}/b": (n_out,)}
        for name, n_in, n_out in (("mlp/c_fc", C, 4 * C), ("mlp/c_proj", 4 * C, C)):
            shapes |= {f"h{i}/{name}/w": (1, n_in, n_out), f"h{i}/{name}/b": (n_out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{i}/{name}/g": (C,), f"h{i}/{name}/b": (C,)}
    return {
        f"model/{name}": (name.endswith("/g") + rng.normal(0, 0.4, shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def main() -> None:
    import tensorflow as tf

    tf1 = tf.compat.v1
    tf1.disable_eager_execution()
    for name, value in variables().items():
        tf1.get_variable(name, initializer=tf.constant(value))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tf1.Session() as session:
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(FOLDER / "model.ckpt"), write_meta_graph=False)
    (FOLDER / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')  # without an absolute path
    read = tf.train.load_checkpoint(str(FOLDER / "model.ckpt"))
    np.savez_compressed(FOLDER / "values.npz", **{name: read.get_tensor(name) for name in variables()})
    hparams = {"n_vocab": V, "n_ctx": T, "n_embd": C, "n_head": H, "n_layer": L}
    (FOLDER / "hparams.json").write_text(json.dumps(hparams) + "\n")


if __name__ == "__main__":
    main()
