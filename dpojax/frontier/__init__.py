"""The reward-KL frontier: its runs, the jobs that make them, and what is read from them."""
