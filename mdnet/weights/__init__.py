"""Published weights → an MD-Net checkpoint: Stable Diffusion, Vision Mamba, the null prompt."""
