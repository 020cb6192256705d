"""Speaking in pieces: what goes through several stages."""
