"""The files of a run: its folder, whose checkpoints are whole or absent. Nothing here knows what is trained.

    runs/NAME/config.json  metrics.jsonl  and the files of the task, such as tokenizer.json
              checkpoints/STEP/params/       Orbax: the parameters
                               opt_state/    Orbax: the optimizer's state
                               average/      Orbax: the moving average of the parameters, with --ema
                               checkpoint.json  step, losses, and what the run was trained on
                               manifest.json    size and sha256 of every other file, written last
              train.lock                     locked as long as a process trains here

A checkpoint is written into a folder of another name and renamed when it is complete, so a process that is killed leaves the
earlier ones as they were. Orbax restores files with flipped bits without a word; the manifest is how they are found. A
damaged checkpoint that a run passes over is set aside as STEP.damaged.
"""
