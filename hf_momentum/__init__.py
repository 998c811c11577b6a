"""hf-momentum."""
