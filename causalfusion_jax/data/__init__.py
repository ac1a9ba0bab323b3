"""Data sources, their registry, and the Grain input pipeline."""
