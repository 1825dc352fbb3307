"""Pretrained trunks, their weights, the feature store and the heads on top."""
