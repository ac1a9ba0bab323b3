"""Parts: the transformer trunk, its attention, cache, positions and presets."""
