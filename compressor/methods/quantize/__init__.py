"""Quantisation: weights of linear maps in few bits, with scales for groups of inputs."""
