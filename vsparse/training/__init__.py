"""Training with sparsity: data, objectives, the loop, checkpoints, distillation."""
