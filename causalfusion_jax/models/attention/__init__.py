"""Softmax attention by the attention rule: dense, in tiles, and on a CPU head by head."""
