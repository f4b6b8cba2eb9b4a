"""Evaluation of trained models: predictions, metrics, analyses, baselines."""
