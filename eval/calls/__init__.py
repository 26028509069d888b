"""What single calls cost: of a layer, of a UNet, in ComfyUI; and what step caching saves and costs."""
