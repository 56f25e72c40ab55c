"""The files of a run. A checkpoint is either complete or absent. Nothing here depends on what is trained.

    runs/NAME/config.json  metrics.jsonl  and the files of the task, such as tokenizer.json
              checkpoints/STEP/params/       Orbax: the parameters
                               opt_state/    Orbax: the optimizer's state
                               average/      Orbax: the moving average of the parameters, with --ema
                               checkpoint.json  step, losses, and what the run was trained on
                               manifest.json    size and sha256 of every other file, written last
              train.lock                     locked while a process is training here

A checkpoint is written to a temporary folder and renamed when it is complete, so killing the process leaves earlier ones
intact. Orbax silently restores files with flipped bits; the manifest detects them. A resumed run renames the corrupt
checkpoints that it skips to STEP.damaged.
"""
