"""From Hugging Face's folders to checkpoints of fairseq, and from those of this plugin to plain fairseq's."""
