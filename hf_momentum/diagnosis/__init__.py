"""Which layers a model's errors point to, and whether retraining them helped."""
