"""What a run is told to do: every key, its checks, and the run that a config resolves to."""
