"""What a user asks for: schema, loading with every error at once, impossible combinations."""
