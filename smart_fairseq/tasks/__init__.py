"""Tasks that fairseq registers, one file a name."""
