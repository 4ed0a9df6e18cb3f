"""Stages of a run: what each needs, trains, and leaves behind. `stage.Stage` is their interface."""
