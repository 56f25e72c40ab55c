"""Writes the model of a run as a folder that Hugging Face's transformers loads. Needs the extra hf.

python scripts/export_hf.py --out exported                      the newest run
python scripts/export_hf.py --workdir runs/mine --out exported

A model with learned positions, LayerNorm and GELU becomes a GPT-2; one with rotary positions, RMSNorm and SwiGLU a Llama;
both without QK-norm and with norms before the sub-layers. Others are refused, with the settings that are in the way.
"""

import logging
from pathlib import Path

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import default_sharding
from minigpt_jax.errors import UsageError
from minigpt_jax.interop import hf_writer
from minigpt_jax.interop.load import load

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
OUT = flags.DEFINE_string("out", None, "folder to make")

log = logging.getLogger("minigpt_jax.export_hf")


def main() -> None:
    if not OUT.value:
        raise UsageError("give the folder to make with --out")
    model = load(WORKDIR.value or cli.newest_run(), default_sharding())
    model_type = hf_writer.write(model, Path(OUT.value))
    log.info("Wrote %s, with model_type %s. In transformers: AutoModelForCausalLM.from_pretrained(%r) and AutoTokenizer's.",
             OUT.value, model_type, OUT.value)  # fmt: skip


if __name__ == "__main__":
    cli.run(main, __doc__)
