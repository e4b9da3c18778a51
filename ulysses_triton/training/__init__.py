"""Training of a small byte-level language model over sequences that are sharded across ranks.

`config` and `data` are values and pure functions, `model` is the network, `sharded` the grid of ranks and the model
spread over it, `checkpoint` what a run goes on from, `loop` one rank's part of a run, `launch` starts the ranks;
`report`, with `run_directory`, `progress`, `plot` and `compare`, is what a user sees of it.
"""
