"""Data directories, noise and mixing."""
