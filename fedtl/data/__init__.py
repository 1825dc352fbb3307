"""Where examples come from, who holds which, and what must not be held twice."""
