"""Metrics of samples and captions, as functions of features and texts."""
