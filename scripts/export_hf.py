"""Exports a run's model to a folder that Hugging Face transformers can load. Needs the extra hf.

python scripts/export_hf.py --out exported                      the newest run
python scripts/export_hf.py --workdir runs/mine --out exported
python scripts/export_hf.py --workdir runs/lora --out adapter          a LoRA run: the adapter, for PEFT
python scripts/export_hf.py --workdir runs/lora --out merged --merge   the same, as a whole model

A model with learned positions, LayerNorm and GELU becomes a GPT-2; one with rotary positions, RMSNorm and SwiGLU a Llama.
Both need pre-norm and no QK-norm. For any other model, the error names the settings that do not fit.
"""

import logging

from absl import flags

from minigpt_jax import cli
from minigpt_jax.api import default_sharding
from minigpt_jax.errors import UsageError
from minigpt_jax.files import local_path
from minigpt_jax.interop import hf_writer, load, peft

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run (default: the newest under runs/)")
MERGE = flags.DEFINE_bool("merge", False, "write a LoRA run as a whole model, with the adapter merged into its base model")
OUT = flags.DEFINE_string("out", None, "folder to create")

log = logging.getLogger("minigpt_jax.export_hf")


def main() -> None:
    if not OUT.value:
        raise UsageError("give the folder to create with --out")
    out, workdir = local_path(OUT.value), local_path(WORKDIR.value or cli.newest_run())
    is_lora = not load.is_huggingface(workdir) and load.read_run_config(workdir).fine_tuning.lora_rank is not None
    if MERGE.value and not (is_lora or peft.is_adapter(workdir)):
        raise UsageError(f"{workdir} has no LoRA adapter: omit --merge")
    if is_lora and not MERGE.value:
        config, base, adapter = load.load_best_adapter(workdir, default_sharding())
        base_folder = peft.write(base, adapter, config.fine_tuning, str(config.training.init_from), out)
        log.info("Exported the adapter of %s to %s, for the base model %s.", workdir, OUT.value, base_folder)
        log.info("Load it with peft.AutoPeftModelForCausalLM.from_pretrained(%r).", OUT.value)
        return
    model_type = hf_writer.write(load.load(workdir, default_sharding()), out)
    log.info("Exported to %s (model_type %s). Load it with transformers.AutoModelForCausalLM.from_pretrained(%r).",
             OUT.value, model_type, OUT.value)  # fmt: skip


if __name__ == "__main__":
    cli.run(main, __doc__)
