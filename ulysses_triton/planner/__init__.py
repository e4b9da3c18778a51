"""What training on long sequences would cost: memory, time and limits, from figures of machines and nothing measured.

Pure functions of frozen values: a `Model`, a `Cluster` and a `Setup` in, bytes and seconds out. All are predictions.
"""
