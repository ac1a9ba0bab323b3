"""Parts: image sources and the Grain input pipeline."""
