"""Training of a small byte-level language model over sequences that are sharded across ranks.

`config` and `data` are values and pure functions, `model` is the network, `loop` is one rank's part of a run, `launch`
starts the ranks; `report`, with `run_directory`, `progress` and `plot`, is what a user sees of it.
"""
