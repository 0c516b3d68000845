"""The compiled train step, its state, the loop and checkpoints."""
