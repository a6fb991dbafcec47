"""What blocks of hybrids have many of beside their mixers, and the fit of what adds to the residual stream."""
