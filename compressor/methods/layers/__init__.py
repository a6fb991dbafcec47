"""Whole layers, or the SSM of whole layers."""
