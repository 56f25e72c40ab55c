"""The default preset with UTF-8 bytes as tokens, trained for about the same time.

python scripts/train.py --config shakespeare_byte --seed 0
python scripts/evaluate.py --workdir runs/shakespeare_byte

Measured on 2026-11-24 on an Intel Xeon server (AVX-512), jax 0.10.2, Python 3.11, with seeds 0, 1 and 2. Loss on the full
validation split: 1.653 nats per byte (1.649 to 1.660), or 2.385 bits per character (2.379 to 2.394). On 2026-11-23 it took
115 to 126 seconds on two cores of an AMD EPYC server under load.
"""

import dataclasses

from minigpt_jax.config import Config, ReferenceResult, load_preset


def get_config() -> Config:
    config = load_preset("shakespeare_char").override({"tokenizer": "byte", "steps": 1850})
    return dataclasses.replace(config, reference_result=ReferenceResult(mean=1.653, spread=0.007, seeds=3))
