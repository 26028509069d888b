"""What changes a diffusers UNet: which layers, one call, one layer's forward, compilation, checkpointing."""
