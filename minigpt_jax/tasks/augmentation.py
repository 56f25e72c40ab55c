"""Random variations of training images, as pure functions of a key and a batch."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def warp(images_BHWC: jax.Array, matrices_B22: jax.Array, shifts_B2: jax.Array) -> jax.Array:
    """Each image about its centre: output pixel p shows input position M (p - centre - shift) + centre, interpolated between
    four pixels. Beyond the border the image continues with its outermost pixels. Axis 2 has (row, column), in pixels."""
    _, H, W, _ = images_BHWC.shape
    pixels_HW2 = jnp.stack(jnp.meshgrid(jnp.arange(H), jnp.arange(W), indexing="ij"), axis=-1).astype(jnp.float32)
    centre_2 = jnp.array([H - 1, W - 1]) / 2
    from_centre_BHW2 = pixels_HW2[None] - centre_2[None, None, None] - shifts_B2[:, None, None]
    sources_BHW2 = jnp.einsum("Bij,BHWj->BHWi", matrices_B22, from_centre_BHW2) + centre_2[None, None, None]

    def channel(image_HW, source_HW2):
        return map_coordinates(image_HW, [source_HW2[..., 0], source_HW2[..., 1]], order=1, mode="nearest")

    return jax.vmap(jax.vmap(channel, in_axes=(-1, None), out_axes=-1))(images_BHWC, sources_BHW2)


def augment(key: jax.Array, images_BHWC: jax.Array, shift, rotation, scale) -> jax.Array:
    """Shifts each image by up to `shift` pixels in both directions, rotates it by up to `rotation` degrees and divides its
    size by up to 1 ± `scale`, all uniformly at random."""
    dy_B, dx_B, turn_B, zoom_B = jax.random.uniform(key, (4, images_BHWC.shape[0]), minval=-1, maxval=1)
    angle_B, factor_B = jnp.deg2rad(rotation * turn_B), 1 + scale * zoom_B
    cos_B, sin_B = factor_B * jnp.cos(angle_B), factor_B * jnp.sin(angle_B)
    matrices_B22 = jnp.stack([jnp.stack([cos_B, -sin_B], axis=-1), jnp.stack([sin_B, cos_B], axis=-1)], axis=1)
    return warp(images_BHWC, matrices_B22, shift * jnp.stack([dy_B, dx_B], axis=-1))
