"""Augmentation: known warps give known images, and random ones depend only on the key and stay within their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal, normal

from minigpt_jax.tasks.augmentation import augment, warp

IMAGES_BHWC = normal(3, 7, 7, 2)
SAME_B22, NONE_B2 = np.stack(3 * [np.eye(2, dtype=np.float32)]), np.zeros((3, 2), np.float32)


def turned(degrees, factor=1.0):
    """The matrix of `augment` for one rotation and scale, for each image."""
    angle = np.deg2rad(degrees)
    matrix_22 = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    return np.stack(3 * [matrix_22])


def test_the_identity_changes_nothing():
    assert_close(warp(IMAGES_BHWC, SAME_B22, NONE_B2), IMAGES_BHWC, atol=1e-6)


def test_a_shift_moves_down_and_right_and_repeats_the_border():
    shifts_B2 = np.array([[2, 0], [0, 1], [-1, 0]], np.float32)
    down, right, up = warp(IMAGES_BHWC, SAME_B22, shifts_B2)
    assert_close(down[2:], IMAGES_BHWC[0, :-2], atol=1e-6)
    assert_close(down[:2], IMAGES_BHWC[0, [0, 0]], atol=1e-6)
    assert_close(right[:, 1:], IMAGES_BHWC[1, :, :-1], atol=1e-6)
    assert_close(up[:-1], IMAGES_BHWC[2, 1:], atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two():
    moved_BHWC = warp(IMAGES_BHWC, SAME_B22, NONE_B2 + np.array([0, 0.5], np.float32))
    assert_close(moved_BHWC[:, :, 1:], (IMAGES_BHWC[:, :, 1:] + IMAGES_BHWC[:, :, :-1]) / 2, atol=1e-5)


def test_a_quarter_turn_is_exact():
    assert_close(warp(IMAGES_BHWC, turned(90), NONE_B2), np.rot90(IMAGES_BHWC, -1, axes=(1, 2)), atol=1e-4)


def test_scale_reads_nearer_to_or_farther_from_the_centre():
    assert_close(warp(IMAGES_BHWC, turned(0, 3), NONE_B2)[:, 2:5, 2:5], IMAGES_BHWC[:, ::3, ::3], atol=1e-4)


def test_augmentation_is_a_function_of_the_key_and_differs_between_images():
    same_BHWC = np.stack(3 * [IMAGES_BHWC[0]])
    first = augment(jax.random.key(0), same_BHWC, 2.0, 12.0, 0.1)
    assert_equal(first, augment(jax.random.key(0), same_BHWC, 2.0, 12.0, 0.1))
    assert not np.allclose(first, augment(jax.random.key(1), same_BHWC, 2.0, 12.0, 0.1))
    assert not np.allclose(first[0], first[1])
    assert not np.allclose(first[1], first[2])


def test_without_ranges_nothing_changes():
    assert_close(augment(jax.random.key(0), IMAGES_BHWC, 0.0, 0.0, 0.0), IMAGES_BHWC, atol=1e-6)


@pytest.mark.parametrize("setting, low, high", [("shift", 2.4, 3.0), ("rotation", 24.0, 30.0), ("scale", 0.16, 0.2)])
def test_each_setting_is_the_largest_change_and_is_nearly_reached(setting, low, high):
    """Measured on images that hold their own coordinates, far from the border."""
    ranges = {"shift": 0.0, "rotation": 0.0, "scale": 0.0} | {setting: high}
    coordinates = jnp.stack(jnp.meshgrid(jnp.arange(-10.0, 11), jnp.arange(-10.0, 11), indexing="ij"), axis=-1)
    images_BHWC = augment(jax.random.key(2), jnp.stack(100 * [coordinates]), **ranges)
    centre_B2, below_B2 = np.asarray(images_BHWC[:, 10, 10]), np.asarray(images_BHWC[:, 15, 10])
    step_B2 = (below_B2 - centre_B2) / 5  # where one pixel further down leads
    right_B2 = (np.asarray(images_BHWC[:, 10, 15]) - centre_B2) / 5
    assert_close(right_B2, step_B2[:, ::-1] * [-1, 1], atol=1e-4)  # at a right angle to it, and as long
    measured = {
        "shift": np.abs(centre_B2).max(axis=0),
        "rotation": np.abs(np.rad2deg(np.arctan2(step_B2[:, 1], step_B2[:, 0]))).max(),
        "scale": np.abs(np.hypot(*step_B2.T) - 1).max(),
    }
    for name, value in measured.items():
        assert np.all(value <= ranges[name] + 1e-3)
    assert np.all(measured[setting] > low)
