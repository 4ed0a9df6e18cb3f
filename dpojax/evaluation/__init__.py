"""What a trained policy is worth, and the figures that show it."""
