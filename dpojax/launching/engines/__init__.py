"""One file for each engine; `dpojax.launching.engine.engines` finds them here by themselves."""
