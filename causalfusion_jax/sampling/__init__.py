"""Jobs: noise-axis solvers and the KV-cached sampler."""
