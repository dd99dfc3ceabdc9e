"""PPO and GRPO with actor, critic, reference and reward on the parallel stack that trains everything else."""
