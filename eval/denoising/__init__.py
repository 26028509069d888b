"""By how much a method raises a model's own denoising loss, stage by stage."""
