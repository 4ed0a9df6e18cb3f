"""Jobs on clusters: one file for an engine that exists, and how to submit it."""
