"""What a trained model is worth: predictions, metrics, analyses, baselines."""
