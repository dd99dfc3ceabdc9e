"""Fine-tuning, reward models and PPO on the parallel stack that trained the model."""
