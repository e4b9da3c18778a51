"""How rows travel between ranks: one protocol per kind of exchange, one file per carrier."""
