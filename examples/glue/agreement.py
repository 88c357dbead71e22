"""Accuracy and cross entropy by the annotators' agreement (figure 2 of the paper); --help lists the options."""

REGISTER_ON_DEMAND = True  # help and errors wait neither for torch nor for fairseq

from smart_fairseq.commands.agreement import main  # noqa: E402

if __name__ == "__main__":
    raise SystemExit(main())
