"""Metrics, references to compare with, and the verdict."""
