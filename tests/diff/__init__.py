"""Random operations on random qcow2 chains, two drivers side by side."""
