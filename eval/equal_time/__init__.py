"""Distance to the unpatched image over time, with fewer steps as the line to beat."""
