"""Model families: which tensor of theirs is which of core's. One small file each; adding one is adding a table."""
