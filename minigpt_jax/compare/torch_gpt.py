"""The GPT of reference.py in idiomatic PyTorch, for comparison. The two share only the config.

guide.md compares them side by side. Here a module owns its parameters as attributes and is called with inputs only.
reference.py has functions of parameters and inputs. All other differences follow from that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from minigpt_jax.config import ModelConfig, TrainingConfig

# ---- Layers --------------------------------------------------------------------------------------------------------------


def init_kernel(kernel_FD: Tensor, config: ModelConfig, scale: float = 1.0) -> None:
    """Normal initialisation in place, with `scale` times the standard deviation of the config's `init`."""
    std = 0.02 if config.init == "gpt2" else kernel_FD.shape[1] ** -0.5
    nn.init.normal_(kernel_FD, std=scale * std)


def residual_scale(config: ModelConfig) -> float:
    """Smaller initial weights for layers that add to the residual stream, since 2 L of their outputs add up (GPT-2)."""
    return (2 * config.num_layers) ** -0.5


def embedding_std(config: ModelConfig) -> float:
    """Standard deviation of an embedding table's initial weights."""
    if config.init == "gpt2" or config.positions == "sinusoidal":
        return 0.02
    return config.embed_dim**-0.5 if config.tie_embeddings else 1.0


def Dense(inputs: int, features: int, config: ModelConfig, scale: float = 1.0) -> nn.Linear:  # noqa: N802
    """x Wᵀ + b over the last axis. PyTorch stores W as (outputs, inputs), Linen as (inputs, outputs)."""
    layer = nn.Linear(inputs, features, bias=config.bias)
    init_kernel(layer.weight, config, scale)
    if config.bias:
        nn.init.zeros_(layer.bias)  # PyTorch's default is uniform
    return layer


def unit_rms(x: Tensor, epsilon: float) -> Tensor:
    """x / √(mean x² + ε) over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


def Norm(config: ModelConfig) -> nn.Module:  # noqa: N802
    """LayerNorm (Ba et al. 2016), or RMSNorm (Zhang & Sennrich 2019), which does not subtract the mean."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.embed_dim, eps=config.norm_epsilon)  # PyTorch's default is the dtype's machine epsilon
    return nn.LayerNorm(config.embed_dim, eps=config.norm_epsilon, bias=config.bias)


ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # PyTorch's default is exact, with erf
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, "Primer"
}


class FeedForward(nn.Module):
    """The same two-layer network at every position: max(0, x W₁ + b₁) W₂ + b₂ ("Attention Is All You Need", equation 2).

    The config chooses the activation. SwiGLU (Shazeer 2020) has a third matrix, whose output gates that of the first.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.up = Dense(config.embed_dim, config.ff_dim, config)
        if config.activation == "swiglu":
            self.gate = Dense(config.embed_dim, config.ff_dim, config)
        self.down = Dense(config.ff_dim, config.embed_dim, config, residual_scale(config))

    def forward(self, x_BTD: Tensor) -> Tensor:
        h_BTF = self.up(x_BTD)
        if self.config.activation == "swiglu":
            h_BTF = F.silu(self.gate(x_BTD)) * h_BTF
        else:
            h_BTF = ACTIVATIONS[self.config.activation](h_BTF)
        return self.down(h_BTF)


def sinusoidal_positions(num_positions: int, dim: int) -> Tensor:
    """PE[t, 2i] = sin(t / 10000^(2i/D)), PE[t, 2i+1] = cos of the same ("Attention Is All You Need", section 3.5)."""
    even_features = torch.arange(0, dim, 2)
    angles = torch.arange(num_positions)[:, None] / 10000.0 ** (even_features / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]


def rotate(x_BHTK: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): rotates feature pair (i, i + K/2) by the angle position / 10000^(2i/K)."""
    T, K = x_BHTK.shape[-2:]
    half = K // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles_Th = torch.arange(T)[:, None] * frequencies
    cos, sin = angles_Th.cos(), angles_Th.sin()
    first, second = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TokenAndPosition(nn.Module):
    """Token embedding, plus learned or sinusoidal positions if the config has them."""

    waves_TD: Tensor  # sinusoidal positions

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.num_embeddings, config.embed_dim)
        nn.init.normal_(self.tokens.weight, std=embedding_std(config))  # PyTorch's default is 1
        if config.positions == "learned":
            self.positions = nn.Embedding(config.context_length, config.embed_dim)
            nn.init.normal_(self.positions.weight, std=embedding_std(config))
        if config.positions == "sinusoidal":
            table_TD = sinusoidal_positions(config.context_length, config.embed_dim)
            self.register_buffer("waves_TD", table_TD, persistent=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        T = tokens_BT.shape[1]
        x_BTD = self.tokens(tokens_BT)
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.positions.weight[:T]
        if self.config.positions == "sinusoidal":
            x_BTD = x_BTD * self.config.embed_dim**0.5 + self.waves_TD[:T]
        return x_BTD


# ---- Attention -----------------------------------------------------------------------------------------------------------


class QKNorm(nn.Module):
    """RMS-normalises each head's queries or keys, which bounds the scores and keeps high learning rates stable (Henry et al.
    2020). With `qk_scale` each feature has a learned scale, shared by the heads, as in Qwen3."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.head_size,), 2**0.5)) if config.qk_scale else None

    def forward(self, x_BHTK: Tensor) -> Tensor:
        y_BHTK = unit_rms(x_BHTK, 1e-6)
        return y_BHTK if self.weight is None else y_BHTK * self.weight


class MultiHeadAttention(nn.Module):
    """Attention in H subspaces of size K = D / H, concatenated and projected ("Attention Is All You Need", section 3.2.2).

    If there are fewer key/value heads than query heads, H / G query heads share each of them: grouped-query attention
    (Ainslie et al. 2023), a smaller cache with nearly the same quality.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, H, G, K = config.embed_dim, config.num_heads, config.kv_heads, config.head_size
        self.query = Dense(D, H * K, config)
        self.key = Dense(D, G * K, config)
        self.value = Dense(D, G * K, config)
        self.output = Dense(H * K, D, config, residual_scale(config))
        if config.qk_norm:
            self.query_norm, self.key_norm = QKNorm(config), QKNorm(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        config = self.config
        H, G, K = config.num_heads, config.kv_heads, config.head_size
        B, T, D = x_BTD.shape

        q_BHTK = self.query(x_BTD).view(B, T, H, K).transpose(1, 2)  # heads first, as PyTorch's attention expects
        k_BGTK = self.key(x_BTD).view(B, T, G, K).transpose(1, 2)
        v_BGTK = self.value(x_BTD).view(B, T, G, K).transpose(1, 2)
        if config.qk_norm:
            q_BHTK, k_BGTK = self.query_norm(q_BHTK), self.key_norm(k_BGTK)
        if config.positions == "rotary":
            q_BHTK, k_BGTK = rotate(q_BHTK), rotate(k_BGTK)

        o_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=G < H)
        return self.output(o_BHTK.transpose(1, 2).reshape(B, T, D))


# ---- Block and stack -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    `pre` normalises a sub-layer's input, x + f(norm(x)), as in GPT-2. `post` normalises the sum, norm(x + f(x)), as in the
    original paper. `pre` trains with higher learning rates and less warmup (Xiong et al. 2020).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm, self.feed_forward_norm = Norm(config), Norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def mixed(self, x_BTD: Tensor) -> Tensor:
        """What a sub-layer reads: with token shift, the second half of the features of the position before."""
        if not self.config.token_shift:
            return x_BTD
        half = x_BTD.shape[-1] // 2
        return torch.cat([x_BTD[..., :half], F.pad(x_BTD[:, :-1, half:], (0, 0, 1, 0))], dim=-1)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.config.norm_placement == "pre":
            y_BTD = self.attention(self.mixed(self.attention_norm(x_BTD)))
            x_BTD = x_BTD + self.dropout(y_BTD)
            x_BTD = x_BTD + self.dropout(self.feed_forward(self.mixed(self.feed_forward_norm(x_BTD))))
        else:
            y_BTD = self.attention(self.mixed(x_BTD))
            x_BTD = self.attention_norm(x_BTD + self.dropout(y_BTD))
            x_BTD = self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(self.mixed(x_BTD))))
        return x_BTD


class Transformer(nn.Module):
    """L blocks, then a final norm if the blocks do not normalise the residual stream (`pre`)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = Norm(config) if config.norm_placement == "pre" else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.final_norm(x_BTD)


# ---- GPT -----------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """A decoder-only language model: logits at position t predict the token at t + 1 from the tokens up to t."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embedding = TokenAndPosition(config)
        self.transformer = Transformer(config)
        self.vocab_size = config.known_vocab_size
        self.head = nn.Linear(config.embed_dim, config.num_embeddings, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.tokens.weight  # one tensor shared by two modules
        else:
            init_kernel(self.head.weight, config)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """logits_BTV."""
        x_BTD = self.embedding(tokens_BT)
        x_BTD = self.transformer(x_BTD)
        return self.head(x_BTD)[..., : self.vocab_size]  # without padding


# ---- Optimizer -----------------------------------------------------------------------------------------------------------


DECAYS = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate_schedule(config: TrainingConfig, num_steps: int) -> Callable[[int], float]:
    """The learning rate at an optimizer step, as a share of the peak: linear warmup, then the decay of `config.schedule`."""
    warmup_steps = min(config.warmup_steps, num_steps)
    decay_steps = max(1, num_steps - 1 - warmup_steps)
    lowest = config.min_learning_rate / config.learning_rate

    def share(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min((step - warmup_steps) / decay_steps, 1.0)
        return lowest + (1 - lowest) * DECAYS[config.schedule](progress)

    return share


COEFFICIENTS = (
    (8.4703, -25.1081, 18.6293), (4.1828, -3.1087, 0.5806), (3.9619, -2.9541, 0.563), (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)  # fmt: skip


def orthogonal(x_MN: Tensor) -> Tensor:
    """About U Vᵀ for x = U S Vᵀ (Jordan et al. 2024)."""
    if x_MN.shape[0] > x_MN.shape[1]:
        return orthogonal(x_MN.T).T
    x_MN = x_MN / (x_MN.norm() + 1e-12)
    for a, b, c in COEFFICIENTS:
        gram_MM = x_MN @ x_MN.T
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return x_MN


class MuonOrAdamW(AdamW):
    """Muon for the group of parameters with `is_muon`, AdamW for the others.

    `torch.optim.Muon` computes in bfloat16, which would hide whether the twins agree.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta, rate = group["betas"][0], group["lr"]
            for parameter in group["params"] if group["is_muon"] else []:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - beta)
                update = orthogonal(mean.lerp(parameter.grad, 1 - beta))
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.sub_(rate * 0.2 * max(parameter.shape) ** 0.5 * update)
                parameter.grad = None  # AdamW leaves it as it is
        super().step(closure)


def make_optimizer(
    config: TrainingConfig, model: nn.Module, num_steps: int, fused: bool | None = None
) -> tuple[AdamW, LambdaLR]:
    """AdamW (Loshchilov & Hutter 2019) or Muon, which updates the parameters it refers to in place, and its schedule."""
    groups = {(has_decay, is_muon): [] for has_decay in (True, False) for is_muon in (True, False)}
    for name, parameter in model.named_parameters():
        is_muon = config.optimizer == "muon" and parameter.ndim == 2 and ".blocks." in name
        groups[parameter.ndim >= 2, is_muon].append(parameter)
    options = [
        {"params": parameters, "weight_decay": config.weight_decay * has_decay, "is_muon": is_muon}
        for (has_decay, is_muon), parameters in groups.items()
    ]
    kind = MuonOrAdamW if config.optimizer == "muon" else AdamW
    optimizer = kind(options, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=1e-8, fused=fused)
    return optimizer, LambdaLR(optimizer, learning_rate_schedule(config, num_steps))


# ---- Training step -------------------------------------------------------------------------------------------------------


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def accumulate_gradients(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor, config: TrainingConfig) -> Tensor:
    """The mean loss. Adds its gradient to the parameters' `grad`."""
    total, num_parts = torch.zeros(()), config.grad_accumulation
    for part_inputs_BT, part_targets_BT in zip(inputs_BT.chunk(num_parts), targets_BT.chunk(num_parts), strict=True):
        loss = next_token_loss(model(part_inputs_BT), part_targets_BT) / num_parts  # equal parts without masked targets
        loss.backward()
        total = total + loss.detach()
    return total


def train_step(
    model: nn.Module, optimizer: AdamW, schedule: LambdaLR, inputs_BT: Tensor, targets_BT: Tensor, config: TrainingConfig,
    average: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One optimizer step. Updates the model, its gradients, the optimizer, the schedule and the average in place.

    Returns the loss and the gradient norm before clipping.
    """
    optimizer.zero_grad()  # `backward` adds to `grad`: wanted within a batch, not across steps
    total = accumulate_gradients(model, inputs_BT, targets_BT, config)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    if average is not None:
        update_average(average, model, min(config.ema, (1 + schedule.last_epoch) / (10 + schedule.last_epoch)))
    schedule.step()
    return total, grad_norm


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """decay · average + (1 - decay) · model, in place."""
    for averaged, parameter in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(parameter, 1 - decay)


# ---- Sampling ------------------------------------------------------------------------------------------------------------


def sample(logits_BV: Tensor, uniform_BV: Tensor) -> Tensor:
    """Tokens sampled with probabilities softmax(logits) from uniform random numbers: the Gumbel-max trick.

    `jax.random.categorical` does the same with uniform numbers derived from its key.
    """
    return (logits_BV - (-uniform_BV.log()).log()).argmax(dim=-1)
