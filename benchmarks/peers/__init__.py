"""Ways to capture activations, ours and others', each in a process of its own in the environment that it needs."""
