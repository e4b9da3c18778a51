"""Training of a small language model, or of one of transformers, over sequences that are sharded across ranks.

`config` and `data` are values and pure functions, `tokens` the text as one mapped file. `model` is the network and
`hugging_face` one of transformers in its place, `sharded` the grid of ranks and the model spread over it, `checkpoint`
what a run goes on from, `loop` one rank's part of a run, `launch` starts the ranks, `command` reads what was asked;
`report`, with `run_directory`, `progress`, `plot` and `compare`, is what a user sees of it. `tiles`, `over_tiles` and
`offload` save memory.
"""
