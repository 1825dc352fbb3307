"""What may be learned from what leaves a client: noise, its account, and sums under masks."""
