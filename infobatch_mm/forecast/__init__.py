"""What pruning is worth on a training, before it is paid for: from gradients of single samples at a checkpoint."""
