"""Exports a run's model to a folder that Hugging Face transformers can load. Needs the extra hf.

python scripts/export_hf.py --out exported                      the newest run
python scripts/export_hf.py --workdir runs/mine --out exported

A model with learned positions, LayerNorm and GELU becomes a GPT-2; one with rotary positions, RMSNorm and SwiGLU a Llama.
Both need pre-norm and no QK-norm. For any other model, the error names the settings that do not fit.
"""

import logging

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import default_sharding
from minigpt_jax.errors import UsageError
from minigpt_jax.files import local_path
from minigpt_jax.interop import hf_writer
from minigpt_jax.interop.load import load

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
OUT = flags.DEFINE_string("out", None, "folder to create")

log = logging.getLogger("minigpt_jax.export_hf")


def main() -> None:
    if not OUT.value:
        raise UsageError("give the folder to create with --out")
    out = local_path(OUT.value)
    model = load(WORKDIR.value or cli.newest_run(), default_sharding())
    model_type = hf_writer.write(model, out)
    log.info("Exported to %s (model_type %s). Load it with transformers.AutoModelForCausalLM.from_pretrained(%r).",
             OUT.value, model_type, OUT.value)  # fmt: skip


if __name__ == "__main__":
    cli.run(main, __doc__)
