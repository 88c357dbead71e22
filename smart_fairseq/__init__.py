"""SMART fine-tuning (Jiang et al., ACL 2020) for fairseq; importing this registers its components."""

__version__ = "0.1.0"
