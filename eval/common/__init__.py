"""What all benchmarks share: protocol, scenarios, models, the machine, and how a command ends."""
