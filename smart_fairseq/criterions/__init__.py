"""Criterions that the plugin registers, one file per name."""
