"""Real clients on their own machines: certificates, keys, approvals, checks, audit, supervision."""
