"""Jobs: scores of generated images."""
