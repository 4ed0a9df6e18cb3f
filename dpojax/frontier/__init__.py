"""The reward-KL frontier: its runs, the plan of jobs that makes them, and what is read from them."""
