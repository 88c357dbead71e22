"""SMART fine-tuning (Jiang et al., ACL 2020) for fairseq; importing this registers its components."""

import functools
import sys

from .errors import install_excepthook

__version__ = "0.1.0"


@functools.cache
def register() -> None:
    """Make the components known to fairseq, and mend there what they need (`patches`)."""
    from .criterions import (  # noqa: F401
        freeat_sentence_prediction,
        freelb_sentence_prediction,
        pgd_sentence_prediction,
        r3f_sentence_prediction,
        rdrop_sentence_prediction,
        smart_sentence_prediction,
    )
    from .models import smart_bert  # noqa: F401
    from .optim import mbpp  # noqa: F401
    from .patches import (
        allow_fairseq_checkpoints,
        copy_at_once,
        copy_checkpoints_whole,
        load_normalized_heads,
        mend_amp,
        read_checkpoints_with_care,
        remember_data,
    )
    from .tasks import smart_multitask, smart_wnli  # noqa: F401

    allow_fairseq_checkpoints()
    copy_at_once()
    copy_checkpoints_whole()
    load_normalized_heads()
    mend_amp()
    read_checkpoints_with_care()
    remember_data()


install_excepthook()
# A command registers when it comes to need fairseq: its help and its errors do not wait for that. For `python -m
# smart_fairseq.commands`, Python imports this package while it looks for the program; the scripts in examples say so.
PROGRAMS = ("commands", "export", "import_hf", "study")
_as_program = sys.argv[:1] == ["-m"] and any(f"{__name__}.{program}" in sys.orig_argv for program in PROGRAMS)
if not (_as_program or getattr(sys.modules["__main__"], "REGISTER_ON_DEMAND", False)):
    register()
