"""A call of a host's loss, taken apart by sample, and what proves that nothing was missed."""
