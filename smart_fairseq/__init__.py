"""SMART fine-tuning (Jiang et al., ACL 2020) for fairseq; importing this registers its components."""

__version__ = "0.1.0"

from .criterions import smart_sentence_prediction  # noqa: F401
from .errors import install_excepthook
from .models import smart_bert  # noqa: F401
from .optim import mbpp  # noqa: F401
from .patches import allow_fairseq_checkpoints, copy_checkpoints_whole, forget_removed_flags

allow_fairseq_checkpoints()
copy_checkpoints_whole()
forget_removed_flags()
install_excepthook()
