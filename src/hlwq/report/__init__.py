"""Measurements as tables, charts, a page and a model card."""
