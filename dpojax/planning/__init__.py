"""What a run would need of chips that are not there, read from programs compiled for them."""
