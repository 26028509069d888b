"""A forecast of UNet calls on GPUs: operators counted on the meta device, their times by a roofline model."""
