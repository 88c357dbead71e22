"""The flags of criteria, and recipes for their values."""
