"""Single weights: masks, SparseGPT, Wanda, magnitude, and Equation 7 of SparseSSM."""
