"""Plans of runs: the jobs that train, export and draw, and the folder of a plan."""
