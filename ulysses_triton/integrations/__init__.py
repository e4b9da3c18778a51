"""Other libraries' models on sharded sequences. Each is imported only inside what needs it."""
