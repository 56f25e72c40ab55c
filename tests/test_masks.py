"""Masks, compared with drawings, and their effect on scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal

from minigpt_jax.models.attention import ages
from minigpt_jax.models.masks import Mask

LOWEST = np.finfo(np.float32).min


def allowed(mask, T, S=None):
    """allowed_BTS, derived from what the mask does to scores of zero."""
    age_BTS = ages(T, S or T)
    rows = max((len(leaf) for leaf in jax.tree.leaves(mask)), default=1)
    return np.asarray(mask(jnp.zeros((rows, 1, T, S or T)), age_BTS))[:, 0] > LOWEST


def parse(drawing):
    return [[[cell == "■" for cell in line.split()] for line in drawing.strip().splitlines()]]


@pytest.mark.parametrize(
    "mask, drawing",
    [
        (Mask(), "■ ■ ■ ■ \n ■ ■ ■ ■ \n ■ ■ ■ ■ \n ■ ■ ■ ■"),
        (Mask(causal=True), "■ · · · \n ■ ■ · · \n ■ ■ ■ · \n ■ ■ ■ ■"),
        (Mask(causal=True, window=2), "■ · · · \n ■ ■ · · \n · ■ ■ · \n · · ■ ■"),
        (Mask(causal=True, window=1), "■ · · · \n · ■ · · \n · · ■ · \n · · · ■"),
        (Mask(causal=True, window=4), "■ · · · \n ■ ■ · · \n ■ ■ ■ · \n ■ ■ ■ ■"),
        (Mask(padding_BS=jnp.array([[1, 1, 1, 0]], bool)), "■ ■ ■ · \n ■ ■ ■ · \n ■ ■ ■ · \n ■ ■ ■ ·"),
        (Mask(causal=True, padding_BS=jnp.array([[1, 0, 1, 1]], bool)), "■ · · · \n ■ · · · \n ■ · ■ · \n ■ · ■ ■"),
        (Mask(segments_BS=jnp.array([[1, 1, 2, 2]])), "■ ■ · · \n ■ ■ · · \n · · ■ ■ \n · · ■ ■"),
        (Mask(causal=True, segments_BS=jnp.array([[1, 1, 2, 2]])), "■ · · · \n ■ ■ · · \n · · ■ · \n · · ■ ■"),
    ],
)
def test_masks_match_their_drawings(mask, drawing):
    assert allowed(mask, 4).tolist() == parse(drawing)


def test_padding_may_differ_between_rows():
    mask = Mask(padding_BS=jnp.array([[1, 1, 0], [1, 0, 0]], bool))
    assert allowed(mask, 2, 3).tolist() == [[[True, True, False]] * 2, [[True, False, False]] * 2]


def test_slopes_subtract_the_distance_in_both_directions():
    scores_BHTS = normal(2, 2, 3, 3)
    biased_BHTS = Mask(slopes=(0.5, 2.0))(scores_BHTS, ages(3, 3))
    distance_TS = np.abs(np.arange(3)[:, None] - np.arange(3)[None, :])
    for head, slope in enumerate((0.5, 2.0)):
        np.testing.assert_allclose(biased_BHTS[:, head], scores_BHTS[:, head] - slope * distance_TS[None], rtol=1e-6)


def test_keys_that_do_not_exist_are_hidden():
    exists_BTS = jnp.array([[[1, 0, 1]] * 3, [[0, 1, 1]] * 3], bool)
    scores_BHTS = Mask(causal=True)(jnp.zeros((2, 1, 3, 3)), ages(3, 3), exists_BTS)
    expected_BTS = np.tri(3, dtype=bool)[None] & np.asarray(exists_BTS)
    assert ((np.asarray(scores_BHTS)[:, 0] > LOWEST) == expected_BTS).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_scores_are_in_float32(dtype):
    for mask in (Mask(), Mask(causal=True, window=2, slopes=(1.0,))):
        assert jax.eval_shape(mask, jnp.zeros((2, 1, 3, 3), dtype), ages(3, 3)).dtype == jnp.float32


@pytest.mark.parametrize(
    "mask, only_past",
    [
        (Mask(causal=True), True),
        (Mask(causal=True, window=3, slopes=(1.0,)), True),
        (Mask(), False),
        (Mask(window=3), False),
        (Mask(causal=True, padding_BS=jnp.ones((1, 3), bool)), False),
        (Mask(causal=True, segments_BS=jnp.ones((1, 3), int)), False),
    ],
)
def test_only_past_requires_a_causal_mask_without_padding(mask, only_past):
    assert mask.only_past == only_past
