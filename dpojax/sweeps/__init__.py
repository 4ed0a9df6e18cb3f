"""Sweeps: members of one config with some keys changed, trained as few programs as possible."""
