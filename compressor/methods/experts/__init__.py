"""Experts of a mixture: whole ones, and neurons of every one."""
