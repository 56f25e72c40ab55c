"""A complete GPT on one page: model, loss, training step and sampling loop, as pure functions of arrays.

Read it from top to bottom. `python -m minigpt_jax.reference` trains a small model within a minute and prints a sample.
The rest of the package, the engine, computes the same functions of the same parameters, only faster. Comments name the
counterparts, and tests compare them for every choice. This page has no safety checks and no 16-bit types, and draws other
dropout masks. Suffixes name dimensions: B batch, T query positions, S key positions, D model width, F feed-forward width,
H query heads, G key/value heads, K head size, V vocabulary, N text length. The engine initialises the parameters:
params = {embedding: {tokens, positions}, transformer: {block_0: {attention: {query, key, value, output}, attention_norm,
          feed_forward: {up, gate, down}, feed_forward_norm}, block_1, ..., final_norm}, head}, kernels: inputs × outputs
"""

import jax
import jax.numpy as jnp
import numpy as np

from minigpt_jax.config import Config, ModelConfig, TrainingConfig
from minigpt_jax.data import batches, corpora
from minigpt_jax.models.gpt import GPT
from minigpt_jax.models.initial import init_params


def embed(params, tokens_BT, config):  # engine: TokenAndPosition in models/layers.py
    x_BTD = params["tokens"]["embedding"][tokens_BT]
    T, D = x_BTD.shape[1:]
    if config.positions == "learned":
        x_BTD = x_BTD + params["positions"]["embedding"][None, :T]
    if config.positions == "sinusoidal":  # "Attention Is All You Need", sections 3.4 and 3.5
        angles = jnp.arange(T)[:, None] / 10000 ** (jnp.arange(0, D, 2) / D)[None, :]
        encoding_TD = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(T, -1)[:, :D]
        x_BTD = x_BTD * D**0.5 + encoding_TD[None]
    return x_BTD


def dense(params, x_BTD):  # engine: Dense in models/layers.py
    return x_BTD @ params["kernel"] + (params["bias"][None, None] if "bias" in params else 0)


def unit_rms(x, epsilon):  # engine: unit_rms in models/ops.py
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon)


def norm(params, x_BTD, config):  # engine: Norm in models/layers.py
    """RMSNorm (Zhang & Sennrich 2019), or LayerNorm (Ba et al. 2016), which subtracts the mean first."""
    if config.norm == "layernorm":
        x_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
    y_BTD = unit_rms(x_BTD, config.norm_epsilon) * params["scale"][None, None]
    return y_BTD + params["bias"][None, None] if "bias" in params else y_BTD


def rotate(x_BTHK):  # engine: rotate in models/ops.py
    """Rotary positions (Su et al. 2021): rotate feature pair (i, i + K/2) at position t by the angle t / 10000^(2i/K)."""
    T, half = x_BTHK.shape[1], x_BTHK.shape[3] // 2
    angles = jnp.arange(T)[None, :, None, None] / 10000 ** (jnp.arange(half) / half)[None, None, None, :]
    z_BTHh = (x_BTHK[..., :half] + 1j * x_BTHK[..., half:]) * jnp.exp(1j * angles)  # pairs as complex numbers
    return jnp.concatenate([z_BTHh.real, z_BTHh.imag], axis=-1)


def attention(params, x_BTD, config):  # engine: MultiHeadAttention in models/layers.py, models/{attention,masks}.py
    """softmax(Q Kᵀ / √K) V in each of H heads ("Attention Is All You Need", equation 1 and section 3.2.2)."""
    (B, T, _), H, G, K = x_BTD.shape, config.num_heads, config.kv_heads, config.head_size
    q_BTHK = dense(params["query"], x_BTD).reshape(B, T, H, K)
    k_BSGK, v_BSGK = (dense(params[name], x_BTD).reshape(B, T, G, K) for name in ("key", "value"))
    if config.qk_norm:
        q_BTHK, k_BSGK = unit_rms(q_BTHK, 1e-6), unit_rms(k_BSGK, 1e-6)
    if config.qk_scale:
        q_BTHK = q_BTHK * params["query_norm"]["scale"][None, None, None]
        k_BSGK = k_BSGK * params["key_norm"]["scale"][None, None, None]
    if config.positions == "rotary":
        q_BTHK, k_BSGK = rotate(q_BTHK), rotate(k_BSGK)
    k_BSHK, v_BSHK = jnp.repeat(k_BSGK, H // G, axis=2), jnp.repeat(v_BSGK, H // G, axis=2)  # shared if G < H
    allowed_TS = jnp.tri(T, dtype=bool) & ~jnp.tri(T, k=-config.context_length, dtype=bool)  # past keys in the context
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / K**0.5
    weights_BHTS = jax.nn.softmax(jnp.where(allowed_TS[None, None], scores_BHTS, -jnp.inf))
    o_BTHK = jnp.einsum("BHTS,BSHK->BTHK", weights_BHTS, v_BSHK)
    return dense(params["output"], o_BTHK.reshape(B, T, H * K))


ACTIVATIONS = {  # engine: ACTIVATIONS in models/ops.py
    "relu2": lambda x: jnp.maximum(x, 0) ** 2,
    "relu": lambda x: jnp.maximum(x, 0),
    "gelu": lambda x: x * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "gelu_exact": lambda x: x * (1 + jax.lax.erf(x / 2**0.5)) / 2,
    "swiglu": lambda x: x / (1 + jnp.exp(-x)),  # SiLU, applied to the gate
}


def feed_forward(params, x_BTD, config):  # engine: FeedForward in models/layers.py
    """f(x W₁) W₂ at every position (same paper, equation 2). SwiGLU (Shazeer 2020) has a gate W₃: (f(x W₃) ⊙ x W₁) W₂."""
    f, h_BTF = ACTIVATIONS[config.activation], dense(params["up"], x_BTD)
    return dense(params["down"], f(dense(params["gate"], x_BTD)) * h_BTF if config.activation == "swiglu" else f(h_BTF))


def block(params, x_BTD, config, dropout):  # engine: Block in models/transformer.py, token_shift.py
    """Each sub-layer f adds to the residual stream x: x + f(norm(x)) with "pre", norm(x + f(x)) with "post" (original)."""
    for name, sublayer in (("attention", attention), ("feed_forward", feed_forward)):
        y_BTD = norm(params[f"{name}_norm"], x_BTD, config) if config.norm_placement == "pre" else x_BTD
        if config.token_shift:  # f reads half of its features one position later, as in RWKV (Peng et al. 2023)
            before_BTD = jnp.pad(y_BTD, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            y_BTD = jnp.where(jnp.arange(config.embed_dim) < config.embed_dim // 2, y_BTD, before_BTD)
        x_BTD = x_BTD + dropout(sublayer(params[name], y_BTD, config))
        x_BTD = norm(params[f"{name}_norm"], x_BTD, config) if config.norm_placement == "post" else x_BTD
    return x_BTD


def gpt(params, tokens_BT, config: ModelConfig, key=None):  # engine: models/{gpt,transformer}.py
    """logits_BTV: position t predicts the token at t + 1 from the tokens up to t. Passing a random key turns dropout on."""
    keep, keys = 1 - config.dropout, None if key is None else iter(jax.random.split(key, 2 * config.num_layers + 1))

    def dropout(x_BTD):  # each call takes the next key
        return x_BTD if keys is None else x_BTD * jax.random.bernoulli(next(keys), keep, x_BTD.shape) / keep

    x_BTD = dropout(embed(params["embedding"], tokens_BT, config))
    for layer in range(config.num_layers):
        x_BTD = block(params["transformer"][f"block_{layer}"], x_BTD, config, dropout)
    x_BTD = norm(params["transformer"]["final_norm"], x_BTD, config) if config.norm_placement == "pre" else x_BTD
    head_DV = params["embedding"]["tokens"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return x_BTD @ head_DV[:, : config.vocab_size]  # without padding, see vocab_multiple in config.py


def loss(params, batch, config, key=None):  # engine: next_token_loss in tasks/next_token.py
    """Mean cross-entropy of the next token, in nats, over the targets where `mask_BT` is true."""
    log_probs_BTV = jax.nn.log_softmax(gpt(params, batch["inputs_BT"], config, key))
    nats_BT = -jnp.take_along_axis(log_probs_BTV, batch["targets_BT"][..., None], axis=-1)[..., 0]
    return (nats_BT * batch["mask_BT"]).sum() / batch["mask_BT"].sum()


def learning_rate(step, training: TrainingConfig, num_steps):  # engine: training/schedule.py
    """Linear warmup to the peak, then decay that reaches the minimum at the last step ("constant" stays at the peak)."""
    peak, minimum, warmup = training.learning_rate, training.min_learning_rate, min(training.warmup_steps, num_steps)
    progress = jnp.clip((step - warmup) / max(1, num_steps - 1 - warmup), 0, 1)
    remaining = {"cosine": (1 + jnp.cos(jnp.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[training.schedule]
    return jnp.where(step < warmup, peak * (step + 1) / max(1, warmup), minimum + (peak - minimum) * remaining)


def init_state(params):  # engine: init_state in training/state.py
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {"step": 0, "params": params, "mean": zeros, "square": zeros, "average": params}  # mean, square: Adam's m, v


@jax.jit(static_argnames=("config", "num_steps"))
def train_step(state, batch, config: Config, num_steps, key=None):  # engine: training/{step,optimizer}.py
    """Clip by the global norm, then AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) in blocks."""
    c, step, tree_map = config.training, state["step"], jax.tree.map
    value, grads = jax.value_and_grad(loss)(state["params"], batch, config.model, key)
    grad_norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = tree_map(lambda g: g * jnp.minimum(1, c.grad_clip / grad_norm), grads)
    mean = tree_map(lambda m, g: c.beta1 * m + (1 - c.beta1) * g, state["mean"], grads)
    square = tree_map(lambda s, g: c.beta2 * s + (1 - c.beta2) * g**2, state["square"], grads)

    def update(path, p, m, s, g):
        change = m / (1 - c.beta1 ** (step + 1)) / (jnp.sqrt(s / (1 - c.beta2 ** (step + 1))) + 1e-8)
        if c.optimizer == "muon" and p.ndim == 2 and "block_" in str(path):
            x_MN = c.beta1 * m + (1 - c.beta1) * g  # the mean gradient, one step ahead (Nesterov 1983)
            x_MN = x_MN / (jnp.linalg.norm(x_MN) + 1e-12)
            for c1, c3, c5 in (  # odd polynomials that bring singular values close to one, engine: training/muon.py
                (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.563), (3.2866, -2.4647, 0.5074),
                (2.2737, -1.6447, 0.4162)):  # fmt: skip
                x_MN = c1 * x_MN + (c3 * x_MN @ x_MN.T + c5 * (x_MN @ x_MN.T) @ (x_MN @ x_MN.T)) @ x_MN
            change = 0.2 * max(p.shape) ** 0.5 * x_MN
        return p - learning_rate(step, c, num_steps) * (change + c.weight_decay * p * (p.ndim >= 2))  # only matrices decay

    params = jax.tree_util.tree_map_with_path(update, state["params"], mean, square, grads)
    ema = jnp.minimum(c.ema, (1 + step) / (10 + step))  # smaller at first, so the initial values soon fade
    average = tree_map(lambda a, p: ema * a + (1 - ema) * p, state["average"], params)
    return {"step": step + 1, "params": params, "mean": mean, "square": square, "average": average}, value


def sample(params, prompt_BN, num_tokens, key, config, process=lambda logits_BV, tokens_BN: logits_BV):
    """Extend each prompt by `num_tokens` samples from softmax(process(logits, tokens so far)), without any caching.
    In rotary models, attention's window slides. The others, once the context is full, move its last half back to position 0.
    Engine: stream in generation/sampling.py, decode.py, context.py. A token's random key depends on row and step only."""
    S, half, (B, N) = config.context_length, config.context_length // 2, prompt_BN.shape
    run, row_key_B = jax.jit(gpt, static_argnames="config"), jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    tokens_BN = np.pad(prompt_BN, ((0, 0), (0, num_tokens)))
    for n in range(N, N + num_tokens):
        start = 0 if config.can_slide or n <= S else n - half - 1 - (n - S - 1) % (S - half)  # of the window
        inputs_BT = np.roll(tokens_BN, -start, axis=1)[:, : None if config.can_slide else S]
        logits_BV = np.asarray(run(params, inputs_BT, config))[:, n - 1 - start]  # later tokens have no effect
        step_key_B = jax.vmap(jax.random.fold_in, (0, None))(row_key_B, n - N)
        tokens_BN[:, n] = jax.vmap(jax.random.categorical)(step_key_B, process(logits_BV, tokens_BN[:, :n]))
    return tokens_BN


def main(num_steps=400):  # engine: run_loop in training/loop.py
    characters = [character for _, piece in corpora.open_text("shakespeare").pieces() for character in piece]
    vocabulary, ids = np.unique(characters, return_inverse=True)
    model = ModelConfig(num_layers=2, num_heads=2, embed_dim=64, ff_dim=256, context_length=64, vocab_size=len(vocabulary))
    config = Config(model, TrainingConfig(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=40, ema=0.97))
    state = init_state(init_params(jax.random.key(0), GPT(model)))  # the engine's initial values
    for step in range(num_steps):
        state, value = train_step(state, batches.batch_at(ids, model.context_length, 16, 0, step), config, num_steps)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{num_steps}  loss {value:.3f} nats per character")
    prompt_BN = np.searchsorted(vocabulary, [list("KING")])
    tokens_BN = sample(state["average"], prompt_BN, 200, jax.random.key(0), model, lambda logits_BV, _: logits_BV / 0.8)
    print("".join(vocabulary[tokens_BN[0]]))


if __name__ == "__main__":
    main()
