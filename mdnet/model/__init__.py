"""MD-Net itself: configuration, the frozen diffusion encoder, Vim, the fusion, and checkpoints."""
