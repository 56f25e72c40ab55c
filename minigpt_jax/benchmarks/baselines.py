"""Training and decoding with PyTorch and Hugging Face. Imports no JAX, which would add to their measured memory."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minigpt_jax.config import Config, ModelConfig
from minigpt_jax.data.batches import Batch

PROMPT_LENGTH, TOP_K = 10, 40


def use_gpu() -> Callable[[], None]:
    """Makes the GPU, if any, PyTorch's default device. Returns a function that waits for it."""
    import torch

    if not torch.cuda.is_available():
        return lambda: None
    torch.set_default_device("cuda")
    return torch.cuda.synchronize


def random_batch(config: Config) -> Batch:
    shape = (config.training.batch_size, config.model.context_length + 1)
    tokens = np.random.default_rng(0).integers(config.model.known_vocab_size, size=shape, dtype=np.int32)
    return {"inputs_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "mask_BT": np.ones_like(tokens[:, 1:], bool)}


class TorchStep:
    """The PyTorch twin's training step."""

    name, needs = "PyTorch eager", "torch"

    def __init__(self, config: Config, num_steps: int):
        import torch

        from minigpt_jax.compare import torch_gpt

        wait = use_gpu()
        model, batch = torch_gpt.GPT(config.model), random_batch(config)
        optimizer, schedule = torch_gpt.make_optimizer(config.training, model, 1000)
        inputs_BT, targets_BT = (torch.tensor(batch[name], dtype=torch.long) for name in ("inputs_BT", "targets_BT"))
        callable_model = self.prepare(model)

        def run():
            for _ in range(num_steps):
                torch_gpt.train_step(callable_model, optimizer, schedule, inputs_BT, targets_BT, config.training)
            wait()

        self.run = run

    def prepare(self, model: Any) -> Any:
        return model


class TorchCompiledStep(TorchStep):
    """The PyTorch twin's training step with a compiled model."""

    name = "PyTorch compiled"

    def prepare(self, model: Any) -> Any:
        import torch

        return torch.compile(model)


class TorchMixedStep:
    """The twin's training step as fast as PyTorch offers it: model and loss compiled, in bfloat16 where it is safe
    (autocast), with a fused AdamW and PyTorch's own attention."""

    name, needs = "PyTorch compiled, bfloat16", "torch"

    def __init__(self, config: Config, num_steps: int):
        import torch

        from minigpt_jax.compare import torch_gpt

        self.torch, wait = torch, use_gpu()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, batch = torch_gpt.GPT(config.model), random_batch(config)
        optimizer, schedule = torch_gpt.make_optimizer(config.training, model, 1000, fused=True)
        inputs_BT, targets_BT = (torch.tensor(batch[name], dtype=torch.long) for name in ("inputs_BT", "targets_BT"))
        loss_of = torch.compile(lambda inputs_BT, targets_BT: torch_gpt.next_token_loss(model(inputs_BT), targets_BT))

        def run():
            for _ in range(num_steps):
                optimizer.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    loss = loss_of(inputs_BT, targets_BT)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.grad_clip)
                optimizer.step()
                schedule.step()
            wait()

        self.run = run

    def report(self) -> dict[str, float]:
        cuda = self.torch.cuda
        return {"device_mb": cuda.max_memory_allocated() / 1e6} if cuda.is_available() else {}


class TorchRecompute:
    """Decoding with the PyTorch twin, which recomputes the whole text for each token."""

    name, needs = "PyTorch, no cache", "torch"

    def __init__(self, config: ModelConfig, batch_size: int, num_tokens: int):
        import torch

        from minigpt_jax.compare import torch_gpt

        wait = use_gpu()
        model = torch_gpt.GPT(config).train(False).to(getattr(torch, config.dtype))

        @torch.no_grad()
        def run():
            tokens_BT = torch.arange(PROMPT_LENGTH).repeat(batch_size, 1)
            for _ in range(num_tokens):
                logits_BV = model(tokens_BT[:, -config.context_length :])[:, -1].float()
                logits_BV[logits_BV < torch.topk(logits_BV, TOP_K).values[:, -1:]] = -torch.inf
                next_B1 = torch.multinomial(torch.softmax(logits_BV, dim=-1), 1)
                tokens_BT = torch.cat([tokens_BT, next_B1], dim=1)
            wait()

        self.run = run


class HuggingFace:
    """Decoding with Hugging Face's GPT-2 and its `generate`, with its cache."""

    name, needs = "Hugging Face, cache", "transformers"

    def __init__(self, config: ModelConfig, batch_size: int, num_tokens: int):
        import torch
        import transformers

        wait = use_gpu()
        transformers.logging.set_verbosity_error()
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=config.num_layers, n_head=config.num_heads, n_embd=config.embed_dim,
                n_positions=config.context_length, vocab_size=config.known_vocab_size, bos_token_id=None, eos_token_id=None,
            )
        ).train(False).to(getattr(torch, config.dtype))  # fmt: skip
        prompt = torch.arange(PROMPT_LENGTH).repeat(batch_size, 1)

        def run():
            model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                do_sample=True,
                top_k=TOP_K,
                use_cache=True,
            )
            wait()

        self.run = run
