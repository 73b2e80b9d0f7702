"""Solvers choose the codes of one weight matrix. They know neither models nor file formats."""
