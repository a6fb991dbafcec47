"""Any torch module: its Mamba and Mamba-2 mixers are pruned, calibrated by the module's own forward."""
