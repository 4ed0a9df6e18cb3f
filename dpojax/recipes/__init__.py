"""Recipes: the experiments of the DPO paper that end in a win rate, as plans of jobs."""
