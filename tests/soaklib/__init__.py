"""Checked input and output on a disk while its chain of layers changes."""
