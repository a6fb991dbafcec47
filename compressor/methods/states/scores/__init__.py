"""The built-in scores of states, registered when this is imported."""

from ssmc.compressor.methods.states.scores import blind, exact, readout, sparsegpt, sparsessm

__all__ = ["blind", "exact", "readout", "sparsegpt", "sparsessm"]
