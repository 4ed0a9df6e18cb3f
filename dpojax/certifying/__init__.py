"""Certificates: the first steps of a config under other meshes, precisions and XLA flags."""
