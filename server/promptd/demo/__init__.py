"""The embedded demo: a small base model, prompts trained on it, and a slice of real data."""
